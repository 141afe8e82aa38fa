"""Samples latents from a diffusion model. Noise and label of sample i depend only on (seed, i).

Legend: B batch, T tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from svgpipe.manifests.evaluation_section import Labels
from svgpipe.manifests.precision import Precision
from svgpipe.models.ddpm import STEPS, ddim_steps, equal_steps, sample_ddpm
from svgpipe.models.dit import DiT
from svgpipe.models.flow import FROM_DIMENSION, shift_of
from svgpipe.models.guidance import Guidance
from svgpipe.models.sampler import SDE, Solver, Watch, sample, times_of_evaluations
from svgpipe.models.seeds import generator, seed_of

from ..runtime.device import autocast

DDPMSolver = Literal["ddpm", "ddim"]
DDPM_SOLVERS: tuple[str, ...] = get_args(DDPMSolver)
ADDED = (
    "guidance_channels",
    "ddim_eta",
    "sde",
    "internal",
)  # settings that were added later: not part of the identity at their default


@dataclass(frozen=True)
class SamplerSettings:
    """One setting of a sweep: everything that determines a latent, besides the model."""

    steps: int
    guidance: float
    solver: Solver | DDPMSolver
    guidance_mode: str
    time_shift: float
    seed: int
    precision: Precision
    weights: str
    labels: Labels = "equal"
    guide: str | None = None
    classes: tuple[int, ...] | None = None  # that are sampled; None: all
    guidance_channels: int | None = None  # that are guided; None: all
    ddim_eta: float | None = None  # share of noise of the solver ddim; None: 0
    sde: SDE | None = None  # settings of the solver sde; None: the defaults
    internal: Literal[True] | None = None  # guided by the auxiliary head; None: not
    repeat: int = 0  # number of the seed among those of the sweep; decides nothing but the name

    @property
    def name(self) -> str:
        """Name of a folder: the values that a sweep varies."""
        return f"steps-{self.steps:03d}_guidance-{self.guidance:g}" + (f"_seed-{self.seed}" if self.repeat else "")

    @property
    def guided(self) -> Guidance:
        """The guidance of the solver."""
        return Guidance(self.guidance, self.guidance_mode, self.guidance_channels)

    @property
    def acts(self) -> bool:
        """Whether guidance changes anything at any evaluation."""
        if self.solver == "ddpm" or self.solver == "ddim":
            evaluations = [*enumerate(1 - number / (STEPS - 1) for number in reversed(self.numbers))]
        else:
            evaluations = times_of_evaluations(self.solver, self.steps, self.time_shift, self.sde or SDE())
        return any(self.guided.weights(step, self.steps, t) != (1, 0) for step, t in evaluations)

    @property
    def numbers(self) -> list[int]:
        """Noising steps that the solvers ddpm and ddim visit. Raises ValueError for a number that is not possible."""
        return ddim_steps(self.steps) if self.solver == "ddim" else equal_steps([self.steps])

    def labels_of(self, indices: Sequence[int], num_classes: int) -> Tensor:
        """Return (B,) int64 labels of samples."""
        classes = range(num_classes) if self.classes is None else self.classes
        return labels_of(indices, classes, self.seed if self.labels == "drawn" else None)

    @property
    def deciding(self) -> SamplerSettings:
        """The same settings in canonical form: without effective guidance, mode and guide are irrelevant."""
        if self.acts:
            return self
        return replace(self, guidance=1.0, guidance_mode="constant", guide=None, guidance_channels=None, internal=None)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides latents, as JSON values. A setting that was added later is left out at its default."""
        values = asdict(self.deciding)
        del values["repeat"]
        return {key: value for key, value in values.items() if key not in ADDED or value is not None}


def shift_told(name: str, shift: float | str, cells: int, channels: int) -> str | None:
    """Return a message with the number of a shift `from-dimension`; None if the recipe gives a number itself."""
    if shift != FROM_DIMENSION:
        return None
    number = shift_of(FROM_DIMENSION, cells, channels)
    return f"{name} {number:.3g}, from the dimension of a latent: {cells} cells x {channels} channels"


def keep_as_computed(model: nn.Module, precision: Precision) -> None:
    """Convert the linear layers to the dtype that autocast would convert them to at every use.

    The results are the same, with half the memory. In place. The model can no longer be trained, or loaded from a file.
    """
    if precision == "bfloat16":
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.to(torch.bfloat16)


def initial_noise(seed: int, indices: Sequence[int], tokens: int, channels: int) -> Tensor:
    """Return (B,T,C) standard normal noise; row b depends only on (seed, indices[b])."""
    return torch.stack([torch.randn(tokens, channels, generator=generator(seed, "sample", i)) for i in indices])


def noise_of_step(seed: int, indices: Sequence[int], shape: Sequence[int], device: torch.device, step: int) -> Tensor:
    """Return (B,T,C) standard normal noise of a stochastic solver; row b depends only on (seed, indices[b], step).

    It is drawn on the device: the same for all CPUs, and the same for all GPUs.
    """
    noise, drawn = torch.empty(len(indices), *shape, device=device), torch.Generator(device)
    for row, index in enumerate(indices):
        noise[row].normal_(generator=drawn.manual_seed(seed_of(seed, "sampling step", index, step)))
    return noise


def labels_of(indices: Sequence[int], classes: Sequence[int], seed: int | None = None) -> Tensor:
    """Return (B,) int64 labels: `classes` in turn, so that all are equally frequent; or drawn from (seed, index)."""
    if seed is None:
        positions = [i % len(classes) for i in indices]
    else:
        positions = [int(torch.randint(len(classes), (1,), generator=generator(seed, "label", i))) for i in indices]
    return torch.tensor([classes[position] for position in positions], dtype=torch.int64)


@torch.no_grad()  # not inference mode: tensors that a sharded model gathers could not be trained on afterwards
def sample_latents(
    model: DiT,
    indices: Sequence[int],
    settings: SamplerSettings,
    device: torch.device,
    guide: DiT | None = None,
    *,
    labels: Tensor | None = None,
    noise: Tensor | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Return normalised latents (B,T,C) float32 of the samples numbered `indices`.

    Args:
        model: the diffusion model.
        indices: numbers of the samples, which decide their noise.
        settings: all else that decides a latent.
        device: of the model.
        guide: a worse model; see `sample`.
        labels: (B,) int64; None: those that the settings give to these numbers.
        noise: (B,T,C) to begin with; None: that of these numbers.
        watch: receives the state of every step, see `sample`.
    """
    if noise is None:
        noise = initial_noise(settings.seed, indices, model.grid[0] * model.grid[1], model.in_channels)
    labels = (settings.labels_of(indices, model.num_classes) if labels is None else labels).to(device)
    common: dict[str, Any] = {
        "null_label": model.null_label,
        "guidance": settings.guided,
        "weak": guide,
        "watch": watch,
        "noise": partial(noise_of_step, settings.seed, indices, noise.shape[1:], device),
    }
    with autocast(device, settings.precision):
        if settings.solver in DDPM_SOLVERS:
            eta = (settings.ddim_eta or 0.0) if settings.solver == "ddim" else None
            latents = sample_ddpm(model, noise.to(device), labels, numbers=settings.numbers, ddim_eta=eta, **common)
        else:
            grid: dict[str, Any] = {"steps": settings.steps, "shift": settings.time_shift, "solver": settings.solver}
            internal = model.final_and_auxiliary if settings.internal else None
            latents = sample(model, noise.to(device), labels, sde=settings.sde, internal=internal, **grid, **common)
    return latents.float()
