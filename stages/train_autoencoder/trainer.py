"""One optimizer step of the autoencoder and its discriminator.

The trainer knows batches and steps, but no files. All processes of a group call it, each with its slice of the batch.
Legend: B images of this process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from svgpipe.manifests.autoencoder_section import AutoencoderSection
from svgpipe.manifests.filesystem import Location
from svgpipe.models.autoencoder import LatentDecoder
from svgpipe.models.backbone import Backbone
from svgpipe.models.kl_autoencoder import KLAutoencoder
from svgpipe.models.losses import (
    LPIPS,
    BackbonePerceptual,
    GeneratorLoss,
    PatchDiscriminator,
    SyncedBatchNorm2d,
    discriminator_loss,
    generator_loss,
)
from svgpipe.models.seeds import seed_of
from svgpipe.models.svg_autoencoder import SVGAutoencoder
from svgpipe.models.vision_loss import distance_matrix_loss, marginal_cosine_loss, vision_loss_weight

from ..runtime.device import autocast, to_device
from ..training.distributed import ProcessGroup, gradient_norms, replicate
from ..training.divergence import DivergenceGuard
from ..training.optimizer import learning_rate, load_optimizer_tensors, optimizer_tensors, set_learning_rate
from .forward import CachedForward, Forward, KLForward, SVGForward


@dataclass(frozen=True)
class Step:
    """Losses of one step by name, on the device.

    Attributes:
        parts: with several processes, the contribution of this one to the means.
        weights: weights that were computed; the same in all processes.
    """

    parts: dict[str, Tensor]
    weights: dict[str, Tensor]


class AutoencoderTrainer:
    """The autoencoder or its decoder, the discriminator (if the recipe has one), and an optimizer for each."""

    def __init__(
        self,
        model: LatentDecoder,
        config: AutoencoderSection,
        group: ProcessGroup,
        backbone: Backbone | None,
        perceptual: BackbonePerceptual | LPIPS | None,
        last_good: Callable[[], Location | None],
        forward: CachedForward | KLForward | SVGForward | None = None,
    ) -> None:
        """Start to train a model.

        Args:
            model: autoencoder, or a decoder alone.
            config: section of the recipe.
            group: processes that share a batch.
            backbone: vision model that kind aligned-kl is trained towards.
            perceptual: perceptual loss.
            last_good: returns the last checkpoint, for the message of a diverged run.
            forward: forward pass of a decoder alone; None: that of the autoencoder.
        """
        self.config, self.group = config, group
        self.model, self.perceptual, self.backbone = model.to(group.device), perceptual, backbone
        for frozen in (perceptual, backbone):
            if frozen is not None:
                frozen.to(group.device)
        self.projection = _new_projection(model, config, group, backbone)
        if forward is None:
            forward = _forward(model, config, self.projection, group)
        self.forward = forward.to(group.device)
        self.reconstruct = replicate(self.forward, group)
        self.discriminator = _new_discriminator(config, group)
        self.judge = None if self.discriminator is None else replicate(_Judgement(self.discriminator), group)
        self.modules: dict[str, nn.Module] = {"generator": model}
        if self.projection is not None:
            self.modules["generator"] = nn.ModuleDict({"model": model, "projection": self.projection})
        if self.discriminator is not None:
            self.modules["discriminator"] = self.discriminator
        trained = {name: [p for p in module.parameters() if p.requires_grad] for name, module in self.modules.items()}
        self.parameters = trained
        self.optimizers = {
            name: torch.optim.Adam(parameters, lr=config.learning_rate, betas=(0.5, 0.9))
            for name, parameters in trained.items()
        }
        names = {id(p): name for part in self.modules.values() for name, p in part.named_parameters()}
        self.guards = {
            name: DivergenceGuard([names[id(p)] for p in parameters], last_good, what=f"the {name}'s loss")
            for name, parameters in trained.items()
        }

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return the training state. Raises the error of `settle` instead of returning a bad state."""
        self.settle()
        groups = {name: optimizer_tensors(self.modules[name], optimizer) for name, optimizer in self.optimizers.items()}
        groups["model"] = self.model.trained_state()
        if self.projection is not None:
            groups["projection"] = self.projection.state_dict()
        if self.discriminator is not None:
            groups["discriminator_model"] = self.discriminator.state_dict()
        return groups

    def load(self, groups: dict[str, dict[str, Tensor]]) -> None:
        """Restore the result of `state`."""
        self.model.load_trained_state(groups["model"])
        for name, optimizer in self.optimizers.items():
            load_optimizer_tensors(self.modules[name], optimizer, groups[name])
        if self.projection is not None:
            self.projection.load_state_dict(groups["projection"])
        if self.discriminator is not None:
            self.discriminator.load_state_dict(groups["discriminator_model"])

    def settle(self) -> None:
        """Check all watched values. Raises the error of `DivergenceGuard.settle`."""
        for guard in self.guards.values():
            guard.settle()

    def __call__(self, step: int, pixels: Tensor, stored: Tensor | None = None) -> Step:
        """Make optimizer step `step` (from 0) on this process's images.

        Args:
            step: number of the step.
            pixels: (B,3,S,S) uint8.
            stored: (B,V,h,w) their values in a cache, for a decoder alone.

        Returns:
            The losses.

        Raises:
            DivergedError: NaN or infinity; on CUDA possibly of the previous step.
        """
        config, group = self.config, self.group
        for optimizer in self.optimizers.values():
            set_learning_rate(optimizer, learning_rate(step, config.steps, config.learning_rate, config.schedule))
        images = to_device(pixels, group.device).float() / 255
        target = images * 2 - 1
        positions = group.local_slice(config.batch_size)
        draws = self.forward.draws(config.seed, step, positions, config.image_size)
        # Dropout uses the global generator: the same in a resumed run with the same number of workers.
        torch.manual_seed(seed_of(config.seed, "dropout", step, group.rank))
        on = self.discriminator is not None and step >= config.discriminator.start_step
        self.model.train()
        with autocast(group.device, config.precision), _frozen(self.discriminator):
            given = images if stored is None else to_device(stored, group.device)
            result: Forward = self.reconstruct(given, *(to_device(values, group.device) for values in draws))
            loss, step_losses = self._losses(target, images, result, on)
        self._apply("generator", step, loss)
        if self.judge is None or not on:
            return step_losses
        with autocast(group.device, config.precision):
            judged = self.judge(target, result.reconstruction.detach(), config.discriminator.loss, config.batch_size)
        self._apply("discriminator", step, judged)
        return Step({**step_losses.parts, "discriminator": judged.detach()}, step_losses.weights)

    def _losses(self, target: Tensor, images: Tensor, result: Forward, on: bool) -> tuple[Tensor, Step]:
        """Return this process's part of the generator's loss, and its parts by name.

        Args:
            target: images in [-1,1].
            images: the same in [0,1].
            result: of the forward pass.
            on: whether the adversarial loss counts.
        """
        config, group, count = self.config, self.group, self.config.batch_size
        loss = generator_loss(
            target,
            result.reconstruction,
            perceptual=self.perceptual,
            perceptual_weight=config.perceptual.weight,
            discriminator=self.discriminator,
            last_layer=self.model.last_layer,
            discriminator_weight=config.discriminator.weight,
            discriminator_on=on,
            count=count,
            total=group.sum,
        )
        total, parts, weights = loss.total, _named(loss), {"adaptive_weight": loss.adaptive_weight}
        if result.posterior is not None:
            divergence = result.posterior.divergence().sum() / count
            total, parts["kl"] = total + config.kl.weight * divergence, divergence.detach()
        if result.projected is not None:
            vision, weight = self._vision_loss(images, result.projected, loss.nll)
            total = total + weight * vision
            parts["vision"], weights["vision_weight"] = vision.detach(), weight
        return total, Step(parts, weights)

    def _vision_loss(self, images: Tensor, projected: Tensor, nll: Tensor) -> tuple[Tensor, Tensor]:
        """Return this process's part of the VF loss, and its weight."""
        section, model = self.config.vision_loss, self.model
        assert self.backbone is not None and isinstance(model, KLAutoencoder), "only kind aligned-kl projects"
        with torch.no_grad():
            features = self.backbone(images)
        distances = distance_matrix_loss(projected, features, section.distance_margin)
        cosines = marginal_cosine_loss(projected, features, section.cosine_margin)
        loss = (distances + cosines).sum() / self.config.batch_size
        if not section.adaptive:
            return loss, torch.full_like(nll, section.weight)
        return loss, vision_loss_weight(nll, loss, model.encoder.conv_out.weight, section.weight, self.group.sum)

    def _apply(self, name: str, step: int, part: Tensor) -> None:
        """Update the parameters with this process's part of a loss; parts add up over the processes."""
        optimizer, parameters = self.optimizers[name], self.parameters[name]
        optimizer.zero_grad(set_to_none=True)
        (part * self.group.size).backward()
        self.guards[name].watch(step + 1, self.group.sum(part.detach()), gradient_norms(parameters, self.group))
        optimizer.step()


class _Judgement(nn.Module):
    """The discriminator's loss in one forward pass."""

    def __init__(self, discriminator: PatchDiscriminator) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, target: Tensor, reconstruction: Tensor, kind: Literal["hinge", "vanilla"], count: int) -> Tensor:
        return discriminator_loss(self.discriminator, target, reconstruction, kind, count)


def _named(loss: GeneratorLoss) -> dict[str, Tensor]:
    """Return the parts of a loss, detached; that of the discriminator is 0 before its first step."""
    return {
        "l1": loss.l1,
        "perceptual": loss.perceptual,
        "nll": loss.nll.detach(),
        "adversarial": loss.adversarial,
        "discriminator": torch.zeros_like(loss.l1),
    }


def _forward(
    model: LatentDecoder, config: AutoencoderSection, projection: nn.Conv2d | None, group: ProcessGroup
) -> SVGForward | KLForward:
    if isinstance(model, KLAutoencoder):
        return KLForward(model, projection)
    assert isinstance(model, SVGAutoencoder)
    if group.size > 1 and model.alignment is not None:
        model.alignment.total = group.sum
    return SVGForward(model, config.decoder_noise, group.sum)


def _new_projection(
    model: LatentDecoder, config: AutoencoderSection, group: ProcessGroup, backbone: Backbone | None
) -> nn.Conv2d | None:
    """Return the 1x1 convolution from latents to the width of the vision model, for kind aligned-kl."""
    if not isinstance(model, KLAutoencoder) or config.kind != "aligned-kl" or backbone is None:
        return None
    torch.manual_seed(seed_of(config.seed, "projection"))
    return nn.Conv2d(model.channels, backbone.channels, 1, bias=False).to(group.device)


def _new_discriminator(config: AutoencoderSection, group: ProcessGroup) -> PatchDiscriminator | None:
    section = config.discriminator
    if not section.enabled:
        return None
    torch.manual_seed(seed_of(config.seed, "discriminator"))
    discriminator = PatchDiscriminator(width=section.width, layers=section.layers).to(group.device)
    for module in discriminator.modules():
        if isinstance(module, SyncedBatchNorm2d) and group.size > 1:
            module.total = group.sum_with_gradient
    return discriminator


@contextmanager
def _frozen(module: nn.Module | None) -> Iterator[None]:
    """Freeze the discriminator during the generator step. DDP could not tell the two backward passes apart.

    Yields:
        Nothing.
    """
    if module is not None:
        module.requires_grad_(False)
    yield
    if module is not None:
        module.requires_grad_(True)
