"""What the autoencoder is trained with: L1 + perceptual + PatchGAN with adaptive weight.

Legend: B batch; x target and r reconstruction are (B,3,H,W) in [-1,1].
Source: official contperceptual_decoder.py and taming-transformers (discriminator); FACTS §7.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from svgpipe.models.backbone import Backbone

Perceptual = Callable[[Tensor, Tensor], Tensor]
"""x, r (B,3,H,W) in [-1,1] → (B,1,1,1) distance."""


class PatchDiscriminator(nn.Module):
    """PatchGAN: (B,3,H,W) → (B,1,h,w) logits. Source: taming-transformers NLayerDiscriminator."""

    def __init__(self, *, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        self.smallest = 6 * 2 ** (layers - 1)  # below, the last convolution has nothing to see
        parts: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
        before = width
        for i in range(1, layers + 1):
            after = width * min(2**i, 8)
            stride = 2 if i < layers else 1
            parts += [
                nn.Conv2d(before, after, 4, stride, 1, bias=False),
                nn.BatchNorm2d(after),
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
        """Raises ValueError for images that are too small for the layers."""
        if min(images.shape[-2:]) < self.smallest:
            raise ValueError(
                f"discriminator: expected images of at least {self.smallest} pixels, found {min(images.shape[-2:])}"
            )
        return self.main(images)


class LPIPS(nn.Module):
    """LPIPS with VGG16: x, r in [-1,1] → (B,1,1,1). Frozen; weights are loaded, never fetched, here.

    Source: arXiv 1801.03924, richzhang/PerceptualSimilarity v0.1; FACTS §7.
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

        Raises ValueError if either does not have the keys and shapes of the named files.
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

    As LPIPS without the learned weights: unit-length channels, squared difference, mean over the grid,
    summed over levels. Images are compared at their own resolution, not at the backbone's `input_size`.
    For where LPIPS's weights cannot be had.
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
    """One generator pass: what to minimise, and its parts (detached scalars)."""

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
) -> GeneratorLoss:
    """nll + f * d_w * g: nll is a sum over pixels per image, not a mean (official logvar stays 0).

    The adaptive weight compares gradients at `last_layer` (the decoder's conv_out.weight). It is only
    computed where it is used; the official code computes it while f = 0 too, to no effect.
    """
    l1 = (x - r).abs()
    distance = perceptual(x, r) if perceptual is not None else torch.zeros(len(x), 1, 1, 1, device=x.device)
    nll = (l1 + perceptual_weight * distance).sum() / len(x)
    adversarial = adaptive = torch.zeros((), device=x.device)
    total = nll
    if discriminator is not None and discriminator_on:
        adversarial = -discriminator(r).mean()
        adaptive = discriminator_weight * adaptive_weight(nll, adversarial, last_layer)
        total = nll + adaptive * adversarial
    return GeneratorLoss(
        total, nll.detach(), l1.mean().detach(), distance.mean().detach(), adversarial.detach(), adaptive
    )


def adaptive_weight(nll: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """clamp(|grad nll| / (|grad g| + 1e-4), 0, 1e4), detached; gradients with respect to `last_layer`."""
    (nll_grad,) = torch.autograd.grad(nll, last_layer, retain_graph=True)
    (g_grad,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (nll_grad.norm() / (g_grad.norm() + 1e-4)).clamp(0.0, 1e4).detach()


def discriminator_loss(
    discriminator: PatchDiscriminator, x: Tensor, r: Tensor, kind: Literal["hinge", "vanilla"]
) -> Tensor:
    """Hinge: 0.5 [mean relu(1 - D(x)) + mean relu(1 + D(r))]; vanilla: with softplus. r is detached here.

    Real and fake pass separately, so that BatchNorm statistics are separate.
    """
    real, fake = discriminator(x.detach()), discriminator(r.detach())
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
