"""One optimizer step of the diffusion transformer.

The trainer knows batches and steps, but neither caches nor files. All processes of a group call it, each with its slice
of the batch. Legend: B samples of this process, T tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from svgpipe.manifests.diffusion_section import DiffusionSection
from svgpipe.manifests.filesystem import Location
from svgpipe.manifests.model_manifests import RAW, average_name, power_name
from svgpipe.models.dit import DiT
from svgpipe.models.ema import new_average, power_exponent, update_averages, update_power_averages
from svgpipe.models.seeds import seed_of

from ..networks.diffusion import build_dit
from ..runtime.device import is_compiled, to_device
from ..training.distributed import (
    ProcessGroup,
    Strategy,
    gradient_norms,
    gradient_sync,
    replicate,
    shard_parameters,
)
from ..training.divergence import DivergenceGuard
from ..training.optimizer import (
    learning_rate,
    load_model_tensors,
    load_optimizer_tensors,
    model_tensors,
    optimizer_tensors,
    set_learning_rate,
)
from .aligned import AlignedDiT, new_aligned
from .alignment_target import AlignmentTarget
from .loss import draws_at, times_of, training_losses


@dataclass(frozen=True)
class Step:
    """Results of one step, on the device, without synchronisation."""

    loss: Tensor  # () mean over the whole batch
    grad_norm: Tensor  # () before clipping
    sample_losses: Tensor  # (B,) of this process
    times: Tensor  # (B,) flow times of its samples, shifted
    alignment: Tensor | None = None  # () mean loss of alignment over the whole batch, without its coefficient


class FlowTrainer:
    """Weights, EMA weights and the optimizer. A call is one step."""

    def __init__(
        self,
        config: DiffusionSection,
        group: ProcessGroup,
        *,
        grid: tuple[int, int],
        channels: int,
        num_classes: int,
        scale: NDArray[np.float32] | None,
        last_good: Callable[[], Location | None],
        strategy: Strategy = "ddp",
        target: AlignmentTarget | None = None,
    ) -> None:
        """Build a new model from the recipe's seed, the same on every process.

        Args:
            config: section `diffusion` of a recipe.
            group: processes that train the model.
            grid: rows and columns of the latents.
            channels: of the latents.
            num_classes: number of labels.
            scale: (C,) factors of stored int8 values, or None.
            last_good: returns the last checkpoint, for the message of a diverged run.
            strategy: how processes share the model; changes results by rounding only.
            target: features to align with.
        """
        self.config, self.group, device = config, group, group.device
        torch.manual_seed(seed_of(config.seed, "initial weights"))
        self.model = build_dit(config, grid=grid, channels=channels, num_classes=num_classes).to(device)
        self.model.recompute = config.activation_checkpointing
        self.averages = [new_average(self.model) for _ in config.ema_decays]
        sigmas = () if config.power_averages is None else config.power_averages.sigmas
        self.power_averages = {sigma: new_average(self.model) for sigma in sigmas}
        self.trained: AlignedDiT | DiT = self.model
        self.projector: nn.Module | None = None
        if target is not None and config.align is not None:
            aligned = new_aligned(self.model, config.align, target.channels, seed_of(config.seed, "projector"))
            self.trained, self.projector = aligned, aligned.projector.to(device)
            self.features = [values.to(device) for values in target.scaling()]
        if group.size > 1 and strategy == "fsdp2":
            for average in (*self.averages, *self.power_averages.values()):
                shard_parameters(average, average.all_blocks, group)
            shard_parameters(self.trained, self.model.all_blocks, group)
            self.averaged: nn.Module = self.trained
        else:
            self.averaged = replicate(self.trained, group)
        self.compiled = torch.compile(self.averaged) if is_compiled(config.compile, device) else self.averaged
        self.parameters, self.model_parameters = list(self.trained.parameters()), list(self.model.parameters())
        self.averaged_parameters = [list(average.parameters()) for average in self.averages]
        self.power_parameters = [list(average.parameters()) for average in self.power_averages.values()]
        self.exponents = [power_exponent(sigma) for sigma in self.power_averages]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.scale = None if scale is None else torch.from_numpy(scale).to(device)
        self.guard = DivergenceGuard([name for name, _ in self.trained.named_parameters()], last_good)

    @property
    def models(self) -> dict[str, DiT]:
        """Weights as trained and all EMA weights, by name."""
        return {RAW: self.model, **dict(zip(map(average_name, self.config.ema_decays), self.averages, strict=True))}

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return the training state. Raises the error of `DivergenceGuard.settle` instead of returning a bad state."""
        self.guard.settle()
        projector = {} if self.projector is None else {"projector": model_tensors(self.projector)}
        power = {power_name(sigma): tensors for sigma, tensors in self.power_weights().items()}
        return self.weights() | power | projector | {"optimizer": optimizer_tensors(self.trained, self.optimizer)}

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Return the tensors of every model, by the names of `models`; complete on the main process."""
        return {name: model_tensors(model) for name, model in self.models.items()}

    def power_weights(self) -> dict[float, dict[str, Tensor]]:
        """Return the tensors of every power average by its length; complete on the main process."""
        return {sigma: model_tensors(average) for sigma, average in self.power_averages.items()}

    def load(self, groups: dict[str, dict[str, Tensor]]) -> None:
        """Restore the result of `state`. World size and strategy may differ from those that saved it."""
        for name, model in self.models.items():
            load_model_tensors(model, groups[name])
        for sigma, average in self.power_averages.items():
            load_model_tensors(average, groups[power_name(sigma)])
        if self.projector is not None:
            load_model_tensors(self.projector, groups["projector"])
        load_optimizer_tensors(self.trained, self.optimizer, groups["optimizer"])

    def __call__(self, step: int, tokens: Tensor, labels: Tensor, features: Tensor | None = None) -> Step:
        """Make optimizer step `step` (from 0) on this process's rows.

        Args:
            step: number of the step.
            tokens: (B,T,C) stored latents.
            labels: (B,).
            features: (B,N,Z) stored features to align with; required if there is a target.

        Returns:
            Losses and gradient norm.

        Raises:
            DivergedError: NaN or infinity; on CUDA possibly of the previous step.
        """
        config, group, size = self.config, self.group, self.config.batch_size
        set_learning_rate(self.optimizer, learning_rate(step, config.steps, config.learning_rate, config.schedule))
        self.optimizer.zero_grad(set_to_none=True)
        losses, times, aligned = [], [], []
        share = group.local_slice(size)
        # The same number of parts on every process, none empty, because sharded models are gathered for each part.
        parts = np.array_split(np.arange(len(share)), min(config.accumulate, size // group.size))
        for number, places in enumerate(parts, 1):
            part = slice(int(places[0]), int(places[-1]) + 1)
            with gradient_sync(self.averaged, enabled=number == len(parts)):
                shown = None if features is None else features[part]
                part_losses, at, alignment = self._losses(step, tokens[part], labels[part], share[part], shown)
                # Parts of any size add up to the mean over all; processes are averaged.
                (part_losses.sum() / size * group.size).backward()
            losses.append(part_losses.detach())
            times.append(at)
            aligned += [] if alignment is None else [alignment]
        per_sample = torch.cat(losses)
        loss, norms = group.sum(per_sample.sum()) / size, gradient_norms(self.parameters, group)
        self.guard.watch(step + 1, loss, norms)
        norm = torch.linalg.vector_norm(norms)
        if config.clip_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, config.clip_grad_norm, norm)
        self.optimizer.step()
        update_averages(self.averaged_parameters, config.ema_decays, self.model_parameters, step)
        update_power_averages(self.power_parameters, self.exponents, self.model_parameters, step + 1)
        alignment = group.sum(torch.cat(aligned).sum()) / size if aligned else None
        return Step(loss, norm, per_sample, torch.cat(times), alignment)

    def _losses(
        self, step: int, tokens: Tensor, labels: Tensor, positions: Sequence[int], features: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return losses, times and losses of alignment, (B,)."""
        device = self.group.device
        stored = to_device(tokens, device).float()
        if self.scale is not None:  # int8 is copied to the device and converted there
            stored = stored * self.scale
        labels = to_device(labels, device)
        length, channels = stored.shape[1], self.model.in_channels
        from_posterior = stored.shape[2] != channels
        draws = draws_at(self.config.seed, step, positions, length, channels, device, posterior=from_posterior)
        if features is not None:
            factor, offset = self.features
            features = to_device(features, device).float() * factor + offset
        x1, null = draws.latents(stored), self.model.null_label
        losses, aligned = training_losses(self.compiled, x1, labels, draws, self.config, null, features)
        return losses, times_of(draws, self.config), aligned
