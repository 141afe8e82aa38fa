"""Losses of the autoencoder: L1 + perceptual + PatchGAN with adaptive weight.

Legend: B batch; x target and r reconstruction are (B,3,H,W) in [-1,1].
Source: official contperceptual_decoder.py and taming-transformers (discriminator).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from .backbone import Backbone
from .residual import itself

ADVERSARIAL_LIMIT = 1e4  # of the adaptive weight of the adversarial loss
Total = Callable[[Tensor], Tensor]
"""Sums over the processes that share a batch."""
Perceptual = Callable[[Tensor, Tensor], Tensor]
"""x, r (B,3,H,W) in [-1,1] → (B,1,1,1) distance."""


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over a batch that is shared by several processes. torch's SyncBatchNorm does not run on the CPU.

    `total` sums over the processes and must carry gradients. None: one process, with torch's own kernel.
    """

    total: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,H,W) → the same shape."""
        if self.total is None or not self.training:
            return super().forward(x)
        values, every = x.float(), (0, 2, 3)
        count = self.total(values.new_full((), values.numel() / self.num_features))
        mean = self.total(values.sum(every)) / count
        centred = values - mean[:, None, None]
        variance = self.total(centred.square().sum(every)) / count
        self._track(mean.detach(), (variance * count / (count - 1)).detach())
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        assert self.momentum is not None, "this layer is always built with a momentum"
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)


class PatchDiscriminator(nn.Module):
    """PatchGAN: (B,3,H,W) → (B,1,h,w) logits. Source: taming-transformers NLayerDiscriminator."""

    def __init__(self, *, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        self.smallest = 6 * 2 ** (layers - 1)  # smaller images leave no input for the last convolution
        parts: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
        before = width
        for i in range(1, layers + 1):
            after = width * min(2**i, 8)
            stride = 2 if i < layers else 1
            parts += [
                nn.Conv2d(before, after, 4, stride, 1, bias=False),
                SyncedBatchNorm2d(after),
                nn.LeakyReLU(0.2, inplace=True),
            ]
            before = after
        parts.append(nn.Conv2d(before, 1, 4, 1, 1))
        self.main = nn.Sequential(*parts)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """(B,3,H,W) → (B,1,h,w) logits.

        Raises:
            ValueError: the images are too small for the layers.
        """
        if min(images.shape[-2:]) < self.smallest:
            raise ValueError(
                f"discriminator: expected images of at least {self.smallest} pixels, found {min(images.shape[-2:])}"
            )
        return self.main(images)


class LPIPS(nn.Module):
    """LPIPS with VGG16: x, r in [-1,1] → (B,1,1,1). Frozen; weights are loaded, never fetched, here.

    Source: arXiv 1801.03924, richzhang/PerceptualSimilarity v0.1.
    """

    shift: Tensor
    scale: Tensor
    TAPS = (3, 8, 15, 22, 29)  # relu1_2, 2_2, 3_3, 4_3, 5_3 in torchvision's numbering
    WIDTHS = (64, 128, 256, 512, 512)

    def __init__(self) -> None:
        super().__init__()
        self.vgg = torchvision.models.vgg16(weights=None).features[: self.TAPS[-1] + 1]
        for layer in self.vgg:
            if isinstance(layer, nn.ReLU):
                layer.inplace = False
        self.lins = nn.ParameterList(torch.zeros(1, width, 1, 1) for width in self.WIDTHS)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.requires_grad_(False)

    def load(self, vgg16: Mapping[str, Tensor], lins: Mapping[str, Tensor]) -> None:
        """Load torchvision's VGG16 state dict and LPIPS's `linN.model.1.weight` file, strictly.

        Raises:
            ValueError: either does not have the keys and shapes of the named files.
        """
        features = {k.removeprefix("features."): v for k, v in vgg16.items() if k.startswith("features.")}
        try:
            self.vgg.load_state_dict(features)
            for i, own in enumerate(self.lins):
                own.copy_(lins[f"lin{i}.model.1.weight"])
        except (RuntimeError, KeyError) as error:
            raise ValueError(f"LPIPS: expected torchvision VGG16 and LPIPS v0.1 weights: {error}") from error

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        total = torch.zeros(len(x), 1, 1, 1, device=x.device)
        a, b = (x - self.shift) / self.scale, (r - self.shift) / self.scale
        tap = 0
        for i, layer in enumerate(self.vgg):
            a, b = layer(a), layer(b)
            if i == self.TAPS[tap]:
                difference = (_unit(a) - _unit(b)).square()
                total = total + (difference * self.lins[tap]).sum(1, keepdim=True).mean((2, 3), keepdim=True)
                tap += 1
        return total


class BackbonePerceptual(nn.Module):
    """Distance in the frozen backbone's own intermediate features: x, r in [-1,1] → (B,1,1,1).

    Like LPIPS without learned weights: unit-length channels, squared difference, mean over the grid, summed over
    levels. Images are compared at their own resolution, not at the backbone's `input_size`. An alternative where the
    weights of LPIPS are not available.
    """

    def __init__(self, backbone: Backbone, levels: Sequence[int]) -> None:
        super().__init__()
        self.backbone, self.level_indices = backbone, tuple(levels)
        side = backbone.input_size
        with torch.no_grad():
            backbone.levels(torch.zeros(1, 3, side, side), self.level_indices)  # raises ValueError for a bad level

    def forward(self, x: Tensor, r: Tensor) -> Tensor:
        with torch.no_grad():
            targets = self.backbone.levels((x + 1) / 2, self.level_indices)
        ours = self.backbone.levels((r + 1) / 2, self.level_indices)
        total = torch.zeros(len(x), 1, 1, 1, device=x.device)
        for a, b in zip(targets, ours, strict=True):
            distance = (_unit(a) - _unit(b)).square().sum(1, keepdim=True)
            total = total + distance.mean((2, 3), keepdim=True)
        return total


def _unit(features: Tensor) -> Tensor:
    # The square root's gradient at an all-zero vector is infinite; LPIPS itself only adds eps outside.
    norm = features.square().sum(1, keepdim=True).clamp_min(1e-20).sqrt()
    return features / (norm + 1e-10)


@dataclass(frozen=True)
class GeneratorLoss:
    """Result of one generator pass: the loss, and its parts (scalars).

    With several processes, all values except the adaptive weight are the contribution of this process: their sum over
    the processes is the mean over the batch. `nll` has its gradient, which other losses are weighted by.
    """

    total: Tensor
    nll: Tensor
    l1: Tensor
    perceptual: Tensor
    adversarial: Tensor
    adaptive_weight: Tensor


def generator_loss(
    x: Tensor,
    r: Tensor,
    *,
    perceptual: Perceptual | None,
    perceptual_weight: float,
    discriminator: PatchDiscriminator | None,
    last_layer: Tensor,
    discriminator_weight: float,
    discriminator_on: bool,
    count: int | None = None,
    total: Total = itself,
) -> GeneratorLoss:
    """nll + f * d_w * g: nll is a sum over pixels per image, not a mean (official logvar stays 0).

    The adaptive weight compares gradients at `last_layer` (the decoder's conv_out.weight). It is only
    computed where it is used; the official code computes it while f = 0 too, to no effect.

    Args:
        x: targets.
        r: reconstructions.
        perceptual: perceptual loss, or None.
        perceptual_weight: its weight.
        discriminator: discriminator, or None.
        last_layer: weight that the adaptive weight is computed at.
        discriminator_weight: weight of the adversarial loss.
        discriminator_on: whether the adversarial loss counts at this step.
        count: number of images of the whole batch; x and r hold the images of this process.
        total: sums over the processes.
    """
    count = count or len(x)
    l1 = (x - r).abs()
    distance = perceptual(x, r) if perceptual is not None else torch.zeros(len(x), 1, 1, 1, device=x.device)
    nll = (l1 + perceptual_weight * distance).sum() / count
    adversarial = adaptive = torch.zeros((), device=x.device)
    loss = nll
    if discriminator is not None and discriminator_on:
        adversarial = -_part_of_mean(discriminator(r), count)
        adaptive = discriminator_weight * adaptive_weight(nll, adversarial, last_layer, total)
        loss = nll + adaptive * adversarial
    return GeneratorLoss(
        total=loss,
        nll=nll,
        l1=_part_of_mean(l1, count).detach(),
        perceptual=_part_of_mean(distance, count).detach(),
        adversarial=adversarial.detach(),
        adaptive_weight=adaptive,
    )


def _part_of_mean(values: Tensor, count: int) -> Tensor:
    """Return () the contribution of values (B,…) to the mean over `count` samples."""
    return values.float().sum() / (count * values[0].numel())


def adaptive_weight(
    nll: Tensor, other: Tensor, layer: Tensor, total: Total = itself, *, largest: float = ADVERSARIAL_LIMIT
) -> Tensor:
    """clamp(|grad nll| / (|grad other| + 1e-4), 0, largest), detached; gradients with respect to `layer`."""
    nll_grad, other_grad = (total(torch.autograd.grad(part, layer, retain_graph=True)[0]) for part in (nll, other))
    return (nll_grad.norm() / (other_grad.norm() + 1e-4)).clamp(0.0, largest).detach()


def discriminator_loss(
    discriminator: PatchDiscriminator,
    x: Tensor,
    r: Tensor,
    kind: Literal["hinge", "vanilla"],
    count: int | None = None,
) -> Tensor:
    """Hinge: 0.5 [mean relu(1 - D(x)) + mean relu(1 + D(r))]; vanilla: with softplus. r is detached here.

    Real and fake pass separately, so that BatchNorm statistics are separate. With `count`, the images of the whole
    batch, it is what this process's share adds to the mean.
    """
    count = count or len(x)
    real, fake = discriminator(x.detach()), discriminator(r.detach())
    if kind == "hinge":
        real, fake = F.relu(1 - real), F.relu(1 + fake)
    else:
        real, fake = F.softplus(-real), F.softplus(fake)
    return 0.5 * (_part_of_mean(real, count) + _part_of_mean(fake, count))
