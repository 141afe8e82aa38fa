"""The residual encoder and its alignment to the frozen features.

Legend: B batch, R residual channels, C frozen channels, h w grid.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class ResidualEncoder(nn.Module):
    """A small ViT whose patch tokens go through a head MLP: (B,3,S,S) ImageNet-normalised → (B,R,h,w).

    Source: official create_small_vit_s (torchvision VisionTransformer, LayerNorm eps 1e-6, erf GELU,
    dropout in train mode only).
    """

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        channels: int = 8,
        depth: int = 6,
        width: int = 384,
        heads: int = 8,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
    ) -> None:
        """Build the module.

        Raises:
            ValueError: the sizes do not divide.
        """
        super().__init__()
        if image_size % patch_size:
            raise ValueError(
                f"residual encoder: image size: expected a multiple of the patch size {patch_size}, found {image_size}"
            )
        if width % heads:
            raise ValueError(f"residual encoder: width {width} is not divisible by heads {heads}")
        self.image_size, self.patch_size, self.channels = image_size, patch_size, channels
        self.vit = VisionTransformer(
            img_size=image_size,
            patch_size=patch_size,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            mlp_ratio=mlp_ratio,
            num_classes=0,
            global_pool="token",
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            pos_drop_rate=dropout,
            proj_drop_rate=dropout,
            attn_drop_rate=dropout,
        )
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, channels))

    def forward(self, images: Tensor) -> Tensor:
        """(B,3,S,S) ImageNet-normalised → (B,R,h,w).

        Raises:
            ValueError: the images are not S pixels square.
        """
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"residual encoder: expected images of {self.image_size}x{self.image_size}, "
                f"found {images.shape[-2]}x{images.shape[-1]}"
            )
        tokens = self.head(self.vit.forward_features(images)[:, 1:])
        side = self.image_size // self.patch_size
        return tokens.transpose(1, 2).reshape(len(images), -1, side, side)


def itself(values: Tensor) -> Tensor:
    """Return the values: the total over one process."""
    return values


def channel_moments(values: Tensor, total: Callable[[Tensor], Tensor] = itself) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased standard deviation per channel over batch and grid: (B,C,h,w) → (C,) and (C,), float32.

    Args:
        values: of this process.
        total: adds up what each of several processes has.
    """
    flat = values.float().transpose(0, 1).flatten(1)
    count = total(torch.full((), flat.shape[1], dtype=torch.float32, device=flat.device))
    mean = total(flat.sum(dim=1)) / count
    variance = total((flat - mean[:, None]).square().sum(dim=1)) / (count - 1)
    return mean, variance.sqrt()


class Alignment(nn.Module):
    """Match the residual's distribution to the frozen features': (B,C,h,w), (B,R,h,w) → (B,R,h,w).

    In train mode the four scalars are those of the batch, detached, as in the official match_distribution; they are
    tracked. In eval mode they are frozen, so that a feature never depends on its batch. This is a deliberate difference
    to the official code, where features differ by up to 0.8 between batches. It is one affine map of the residual.
    Source: official dino_decoder.py.
    """

    # Exponential tracking, because the residual encoder changes during training and old batches should be forgotten.
    MOMENTUM = 0.99

    scalars: Tensor
    num_tracked: Tensor

    def __init__(self) -> None:
        super().__init__()
        # With several processes, the trainer sets the function that sums over them.
        self.total: Callable[[Tensor], Tensor] = itself
        self.register_buffer("scalars", torch.tensor([0.0, 1.0, 0.0, 1.0]))
        self.register_buffer("num_tracked", torch.tensor(0, dtype=torch.int64))

    @staticmethod
    def statistics(frozen: Tensor, residual: Tensor, total: Callable[[Tensor], Tensor] = itself) -> Tensor:
        """The four scalars [frozen mean, frozen std, residual mean, residual std], each averaged over channels.

        Means and unbiased stds are per channel over batch and grid, where `total` adds up what each of several
        processes has.

        Raises:
            ValueError: there is only one value per channel (the official code gives NaN).
        """
        if frozen.shape[0] * frozen[0, 0].numel() < 2:
            raise ValueError("alignment: expected at least two values per channel, found one")
        parts = []
        for values in (frozen.detach(), residual.detach()):
            mean, deviation = channel_moments(values, total)
            parts += [mean.mean(), deviation.mean()]
        return torch.stack(parts)

    def freeze(self, scalars: Tensor) -> None:
        """Set the scalars for eval mode, measured over many images."""
        self.scalars.copy_(scalars)
        self.num_tracked.fill_(1)

    def forward(self, frozen: Tensor, residual: Tensor) -> Tensor:
        """(B,C,h,w), (B,R,h,w) → (B,R,h,w).

        Raises:
            ValueError: eval mode, and no scalars were tracked or frozen.
        """
        if self.training:
            scalars = self.statistics(frozen, residual, self.total)
            # Decided on the device: reading the number would make every step wait for it.
            weight = torch.where(self.num_tracked > 0, 1 - self.MOMENTUM, 1.0).to(scalars.dtype)
            self.scalars.lerp_(scalars, weight)
            self.num_tracked += 1
        elif self.num_tracked == 0:
            raise ValueError("alignment: expected frozen scalars, found none; train or calibrate first")
        else:
            scalars = self.scalars
        mean_h, std_h, mean_v, std_v = scalars.unbind()
        return (residual - mean_v) / (std_v + 1e-6) * std_h + mean_h
