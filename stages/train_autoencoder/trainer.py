"""One optimizer step of the autoencoder and its discriminator.

The trainer knows batches and steps, but no files. All processes of a group call it, each with its slice of the batch.
Legend: B images of this process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from svgpipe.manifests.filesystem import Location
from svgpipe.manifests.recipe import AutoencoderSection
from svgpipe.models.autoencoder import Autoencoder
from svgpipe.models.losses import (
    LPIPS,
    BackbonePerceptual,
    GeneratorLoss,
    PatchDiscriminator,
    SyncedBatchNorm2d,
    discriminator_loss,
    generator_loss,
)
from svgpipe.models.seeds import generator, seed_of

from ..runtime.device import autocast, to_device
from ..training.distributed import ProcessGroup, gradient_norms, replicate
from ..training.divergence import DivergenceGuard
from ..training.optimizer import learning_rate, load_optimizer_tensors, optimizer_tensors, set_learning_rate


@dataclass(frozen=True)
class Step:
    """Losses of one step, on the device; with several processes, the contribution of this one to the means."""

    generator: GeneratorLoss
    discriminator: Tensor  # () 0 before its first step


class AutoencoderTrainer:
    """The autoencoder, its discriminator (if the recipe has one), and an optimizer for each."""

    def __init__(
        self,
        model: Autoencoder,
        config: AutoencoderSection,
        group: ProcessGroup,
        perceptual: BackbonePerceptual | LPIPS | None,
        last_good: Callable[[], Location | None],
    ) -> None:
        """Build a new model. `last_good` returns the last checkpoint, for the message of a diverged run."""
        self.config, self.group = config, group
        self.model, self.perceptual = model.to(group.device), perceptual
        if perceptual is not None:
            perceptual.to(group.device)
        if group.size > 1 and model.alignment is not None:
            model.alignment.total = group.sum
        self.reconstruct = replicate(_Reconstruction(model), group)
        self.discriminator = _new_discriminator(config, group)
        self.judge = None if self.discriminator is None else replicate(_Judgement(self.discriminator), group)
        trained = {"generator": [p for p in model.parameters() if p.requires_grad]}
        if self.discriminator is not None:
            trained["discriminator"] = list(self.discriminator.parameters())
        self.parameters = trained
        self.optimizers = {
            name: torch.optim.Adam(parameters, lr=config.learning_rate, betas=(0.5, 0.9))
            for name, parameters in trained.items()
        }
        names = {id(p): name for part in (model, self.discriminator) if part for name, p in part.named_parameters()}
        self.guards = {
            name: DivergenceGuard([names[id(p)] for p in parameters], last_good, what=f"the {name}'s loss")
            for name, parameters in trained.items()
        }

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return the training state. Raises the error of `settle` instead of returning a bad state."""
        self.settle()
        groups = {name: optimizer_tensors(self._module(name), optimizer) for name, optimizer in self.optimizers.items()}
        groups["model"] = self.model.trained_state()
        if self.discriminator is not None:
            groups["discriminator_model"] = self.discriminator.state_dict()
        return groups

    def load(self, groups: dict[str, dict[str, Tensor]]) -> None:
        """Restore the result of `state`."""
        self.model.load_trained_state(groups["model"])
        for name, optimizer in self.optimizers.items():
            load_optimizer_tensors(self._module(name), optimizer, groups[name])
        if self.discriminator is not None:
            self.discriminator.load_state_dict(groups["discriminator_model"])

    def _module(self, name: str) -> nn.Module:
        """Return the module whose parameters an optimizer updates."""
        return self.model if name == "generator" or self.discriminator is None else self.discriminator

    def settle(self) -> None:
        """Check all watched values. Raises the error of `DivergenceGuard.settle`."""
        for guard in self.guards.values():
            guard.settle()

    def __call__(self, step: int, pixels: Tensor) -> Step:
        """Make optimizer step `step` (from 0) on this process's images (B,3,S,S) uint8.

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
        mask_draws = mask_draws_at(config.seed, step, group.local_slice(config.batch_size), group.device)
        # Dropout uses the global generator: the same in a resumed run with the same number of workers.
        torch.manual_seed(seed_of(config.seed, "dropout", step, group.rank))
        on = self.discriminator is not None and step >= config.discriminator.start_step
        self.model.train()
        with autocast(group.device, config.precision), _frozen(self.discriminator):
            reconstruction = self.reconstruct(images, mask_draws)
            loss = generator_loss(
                target,
                reconstruction,
                perceptual=self.perceptual,
                perceptual_weight=config.perceptual.weight,
                discriminator=self.discriminator,
                last_layer=self.model.decoder.conv_out.weight,
                discriminator_weight=config.discriminator.weight,
                discriminator_on=on,
                count=config.batch_size,
                total=group.sum,
            )
        self._apply("generator", step, loss.total)
        if self.judge is None or not on:
            return Step(loss, torch.zeros((), device=group.device))
        with autocast(group.device, config.precision):
            judged = self.judge(target, reconstruction.detach(), config.discriminator.loss, config.batch_size)
        self._apply("discriminator", step, judged)
        return Step(loss, judged.detach())

    def _apply(self, name: str, step: int, part: Tensor) -> None:
        """Update the parameters with this process's part of a loss; parts add up over the processes."""
        optimizer, parameters = self.optimizers[name], self.parameters[name]
        optimizer.zero_grad(set_to_none=True)
        (part * self.group.size).backward()
        self.guards[name].watch(step + 1, self.group.sum(part.detach()), gradient_norms(parameters, self.group))
        optimizer.step()


class _Reconstruction(nn.Module):
    """Encodes and decodes in one forward pass, so that DDP averages its gradients."""

    def __init__(self, model: Autoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, mask_draws: Tensor) -> Tensor:
        return self.model.decode(self.model.encode(images, mask_draws)).float()


class _Judgement(nn.Module):
    """The discriminator's loss in one forward pass."""

    def __init__(self, discriminator: PatchDiscriminator) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, target: Tensor, reconstruction: Tensor, kind: Literal["hinge", "vanilla"], count: int) -> Tensor:
        return discriminator_loss(self.discriminator, target, reconstruction, kind, count)


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


def mask_draws_at(seed: int, step: int, positions: Sequence[int], device: torch.device) -> Tensor:
    """Return (B,) uniform draws in [0, 1) that decide the masking; a function of (seed, step, position)."""
    draws = [torch.rand(1, generator=generator(seed, "image", step, position)) for position in positions]
    return to_device(torch.cat(draws), device)
