"""Drawing latents from a diffusion model: noise and label of sample i are functions of (seed, i) alone.

Legend: B batch, T tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from svgpipe.manifests.precision import Precision
from svgpipe.manifests.recipe import Labels
from svgpipe.models.dit import DiT
from svgpipe.models.sampler import Guidance, Solver, sample, time_grid
from svgpipe.models.seeds import generator

from ..runtime.device import autocast


@dataclass(frozen=True)
class SamplerSettings:
    """One point of a sweep: everything that decides a latent besides the model."""

    steps: int
    guidance: float
    solver: Solver
    guidance_mode: str
    time_shift: float
    seed: int
    precision: Precision
    weights: str
    labels: Labels = "equal"
    guide: str | None = None

    @property
    def name(self) -> str:
        """Folder name: the two values that a sweep varies."""
        return f"steps-{self.steps:03d}_guidance-{self.guidance:g}"

    @property
    def acts(self) -> bool:
        """Whether guidance changes anything at any evaluation."""
        guidance, times = Guidance(self.guidance, self.guidance_mode), time_grid(self.steps, self.time_shift).tolist()
        evaluations = [*enumerate(times[:-1]), *(enumerate(times[1:]) if self.solver == "heun" else ())]
        return any(guidance.weights(step, self.steps, t) != (1, 0) for step, t in evaluations)

    @property
    def deciding(self) -> SamplerSettings:
        """The same latents in one way of saying it: where nothing guides, no mode and no guide matter."""
        return self if self.acts else replace(self, guidance=1.0, guidance_mode="constant", guide=None)


def keep_as_computed(model: nn.Module, precision: Precision) -> None:
    """Keep what autocast would convert before every use, the linear layers, in the dtype that they compute in.

    The same numbers at half the memory. In place; no such model can be trained, or loaded from, any more.
    """
    if precision == "bfloat16":
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.to(torch.bfloat16)


def initial_noise(seed: int, indices: Sequence[int], tokens: int, channels: int) -> Tensor:
    """(B,T,C) standard normal; row b depends on (seed, indices[b]) only."""
    return torch.stack([torch.randn(tokens, channels, generator=generator(seed, "sample", i)) for i in indices])


def labels_of(indices: Sequence[int], num_classes: int, settings: SamplerSettings | None = None) -> Tensor:
    """(B,) int64: classes in turn, so that every class is drawn equally often; or each drawn from (seed, index)."""
    if settings is None or settings.labels == "equal":
        return torch.tensor([i % num_classes for i in indices], dtype=torch.int64)
    drawn = [torch.randint(num_classes, (1,), generator=generator(settings.seed, "label", i)) for i in indices]
    return torch.cat([torch.zeros(0, dtype=torch.int64), *drawn])


@torch.no_grad()  # not inference mode: what a sharded model gathers then could not be trained on afterwards
def sample_latents(
    model: DiT, indices: Sequence[int], settings: SamplerSettings, device: torch.device, guide: DiT | None = None
) -> Tensor:
    """Normalised latents (B,T,C) float32 of the samples numbered `indices`; `guide` is a worse model, see `sample`."""
    noise = initial_noise(settings.seed, indices, model.grid[0] * model.grid[1], model.in_channels)
    with autocast(device, settings.precision):
        return sample(
            model,
            noise.to(device),
            labels_of(indices, model.num_classes, settings).to(device),
            null_label=model.null_label,
            steps=settings.steps,
            shift=settings.time_shift,
            solver=settings.solver,
            guidance=Guidance(settings.guidance, settings.guidance_mode),
            weak=guide,
        ).float()
