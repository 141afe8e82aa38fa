"""The VF loss of VA-VAE: latents are pulled towards the features of a frozen vision model.

Legend: B batch, F feature channels, h w grid, N = h w positions.
Source: official LightningDiT vavae/ldm/modules/losses/contperceptual.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .losses import Total, adaptive_weight
from .residual import itself

LIMIT = 1e8  # of the adaptive weight


def distance_matrix_loss(projected: Tensor, features: Tensor, margin: float) -> Tensor:
    """Return (B,) mean over pairs of positions of relu(|cos(z_i,z_j) - cos(f_i,f_j)| - margin).

    Args:
        projected: (B,F,h,w) z, latents projected to the width of the features.
        features: (B,F,h,w) f, of the vision model.
        margin: difference of the cosines that costs nothing.
    """
    ours, theirs = (F.normalize(values.float().flatten(2), dim=1) for values in (projected, features))  # (B,F,N)
    with torch.autocast(projected.device.type, enabled=False):  # which would multiply in bfloat16
        cosines, targets = (unit.transpose(1, 2) @ unit for unit in (ours, theirs))
    return F.relu((cosines - targets).abs() - margin).mean(dim=(1, 2))


def marginal_cosine_loss(projected: Tensor, features: Tensor, margin: float) -> Tensor:
    """Return (B,) mean over positions of relu(1 - margin - cos(z_i,f_i)); arguments as `distance_matrix_loss`."""
    cosine = F.cosine_similarity(projected.float(), features.float(), dim=1)
    return F.relu(1 - margin - cosine).mean(dim=(1, 2))


def vision_loss_weight(nll: Tensor, loss: Tensor, layer: Tensor, setting: float, total: Total = itself) -> Tensor:
    """Return the adaptive weight: setting · |grad nll| / (|grad loss| + 1e-4), gradients at the encoder's last layer.

    Args:
        nll: reconstruction loss, a sum over the pixels of an image.
        loss: VF loss.
        layer: weight of the encoder's last convolution.
        setting: weight of the recipe.
        total: sums over the processes.
    """
    return setting * adaptive_weight(nll, loss, layer, total, largest=LIMIT)
