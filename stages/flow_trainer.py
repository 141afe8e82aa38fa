"""One optimiser step of the diffusion transformer, and the state that it changes.

Knows batches and steps, but neither caches nor files. Legend: B batch, T tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from svgpipe.manifests.checkpoint import RAW, average_name
from svgpipe.manifests.recipe import DiffusionSection
from svgpipe.manifests.storage import Location
from svgpipe.models.averages import new_average, update_averages
from svgpipe.models.dit import DiT
from svgpipe.models.flow import shift_time
from svgpipe.stages.draws import draws_at
from svgpipe.stages.flow_losses import sample_losses
from svgpipe.stages.guard import DivergenceGuard, gradient_norms
from svgpipe.stages.sampling import build_dit
from svgpipe.stages.training import learning_rate, optimizer_tensors, restore_optimizer, seed_of, set_learning_rate


@dataclass(frozen=True)
class Step:
    """What one step found, on the device: nobody has waited for it yet."""

    loss: Tensor  # () mean over the batch
    grad_norm: Tensor  # () before clipping
    sample_losses: Tensor  # (B,)
    times: Tensor  # (B,) flow times of the samples, shifted


class FlowTrainer:
    """Weights, their averages and the optimiser; calling it is one step."""

    def __init__(
        self,
        config: DiffusionSection,
        device: torch.device,
        *,
        grid: tuple[int, int],
        channels: int,
        num_classes: int,
        scale: NDArray[np.float32] | None,
        last_good: Callable[[], Location | None],
    ) -> None:
        """A new model from the recipe's seed.

        Args:
            scale: (C,) that turns stored int8 into features, or None.
            last_good: where the last saved state lies, for the message of a run that diverges.
        """
        self.config, self.device = config, device
        torch.manual_seed(seed_of(config.seed, "initial weights"))
        self.model = build_dit(config.model, grid=grid, channels=channels, num_classes=num_classes).to(device)
        self.model.recompute = config.activation_checkpointing
        self.averages = [new_average(self.model) for _ in config.ema_decays]
        compiled = device.type == "cuda" if config.compile == "auto" else config.compile
        self.velocity = torch.compile(self.model) if compiled else self.model
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.scale = None if scale is None else torch.from_numpy(scale).to(device)
        self.guard = DivergenceGuard([name for name, _ in self.model.named_parameters()], last_good)

    @property
    def models(self) -> dict[str, DiT]:
        """The weights as trained and every average of them, by the names that people choose them by."""
        return {RAW: self.model, **dict(zip(map(average_name, self.config.ema_decays), self.averages, strict=True))}

    def state(self) -> dict[str, dict[str, Tensor]]:
        """All that a resumed run needs besides the step's number. Raises DivergedError rather than give a bad one."""
        self.guard.settle()
        groups: dict[str, dict[str, Tensor]] = {name: model.state_dict() for name, model in self.models.items()}
        return groups | {"optimizer": optimizer_tensors(self.optimizer)}

    def load(self, groups: dict[str, dict[str, Tensor]]) -> None:
        """Inverse of `state`."""
        for name, model in self.models.items():
            model.load_state_dict(groups[name])
        restore_optimizer(self.optimizer, groups["optimizer"])

    def __call__(self, step: int, tokens: Tensor, labels: Tensor) -> Step:
        """Optimiser step number `step` (from 0) on stored latents (B,T,C) and labels (B,).

        Raises:
            DivergedError: a NaN or infinity; on CUDA it may be the step before that is named.
        """
        config, size = self.config, len(tokens)
        set_learning_rate(self.optimizer, learning_rate(step, config.steps, config.learning_rate, config.schedule))
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        losses, times = [], []
        for positions in np.array_split(np.arange(size), config.accumulate):
            part = slice(int(positions[0]), int(positions[-1]) + 1)
            found, at = self._losses(step, tokens[part], labels[part], positions.tolist())
            (found.sum() / size).backward()  # so that parts of any size add up to the mean over all
            losses.append(found.detach())
            times.append(at)
        per_sample = torch.cat(losses)
        loss, norms = per_sample.mean(), gradient_norms(self.parameters)
        self.guard.watch(step + 1, loss, norms)
        norm = torch.linalg.vector_norm(norms)
        if config.clip_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, config.clip_grad_norm, norm)
        self.optimizer.step()
        update_averages(self.averages, config.ema_decays, self.model, step)
        return Step(loss, norm, per_sample, torch.cat(times))

    def _losses(self, step: int, tokens: Tensor, labels: Tensor, positions: list[int]) -> tuple[Tensor, Tensor]:
        if self.device.type == "cuda":  # copies from pinned memory run beside the computation
            tokens, labels = tokens.pin_memory(), labels.pin_memory()
        x1 = tokens.to(self.device, non_blocking=True).float()
        if self.scale is not None:  # int8 travels to the device, and becomes a feature there
            x1 = x1 * self.scale
        labels = labels.to(self.device, non_blocking=True)
        draws = draws_at(self.config.seed, step, positions, x1.shape[1], x1.shape[2], self.device)
        losses = sample_losses(self.velocity, x1, labels, draws, self.config, null_label=self.model.null_label)
        return losses, shift_time(draws.time, self.config.time_shift)
