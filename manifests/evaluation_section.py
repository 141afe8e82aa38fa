"""Recipe: settings of `svgpipe sample-and-eval` and `svgpipe eval-reconstruction`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from .feature_spaces import SpaceName
from .precision import Precision
from .presets import NAMES as PRESETS
from .presets import Preset, preset_values
from .protocols import NAMES as PROTOCOLS
from .protocols import Protocol, protocol_values
from .section import Natural, Positive, Section, TimeShift

Labels = Literal["equal", "drawn"]
WEIGHTS = r"^(raw|ema|(ema-)?0(\.\d+)?|power-0\.\d+)$"
MIN_RESAMPLINGS = 20  # fewer have no quantiles for a 95 % interval


def _enough(resamplings: int) -> int:
    if resamplings != 0 and resamplings < MIN_RESAMPLINGS:
        raise ValueError(f"expected 0 (no intervals) or at least {MIN_RESAMPLINGS}")
    return resamplings


Resamplings = Annotated[int, AfterValidator(_enough)]


class ExtractorSection(Section):
    """The feature extractor of the metrics."""

    kind: Literal["inception", "backbone", "timm"] = Field(
        "inception",
        description="inception (torch-fidelity's), backbone (of the autoencoder), or timm (any timm model).",
    )
    weights: str = Field(
        "hub",
        description="inception: torch-fidelity's file, or hub: download it. timm: as backbone.weights.",
    )
    name: str | None = Field(None, description="timm: name of the model.")
    input_size: Positive | None = Field(
        None, description="timm: pixels per side that images are resized to; null: the model's own."
    )

    @model_validator(mode="after")
    def _of_timm(self) -> Self:
        if (self.kind == "timm") != (self.name is not None):
            raise ValueError("name is the name of a timm model: required for kind timm, not allowed for other kinds")
        if self.kind != "timm" and self.input_size is not None:
            raise ValueError(f"input_size belongs to kind timm, found kind {self.kind}")
        return self


class SDESection(Section):
    """The solver sde, Euler-Maruyama. The defaults are those of SiT's script and of REPA."""

    diffusion: Literal["sigma", "decreasing"] = Field(
        "sigma", description="Noise at time t: sigma (1 - t), or decreasing ((1 + cos(pi t))^2 / 4)."
    )
    last_step: Literal["mean", "euler"] = Field(
        "mean", description="Last step, without noise: mean (along the drift), or euler (along the velocity alone)."
    )
    last_step_size: float = Field(0.04, ge=1e-4, lt=1, description="Size of the last step, before time_shift.")


class EvaluationSection(Section):
    """`svgpipe sample-and-eval`: a sweep of steps × guidance, decoded and measured."""

    preset: Preset | None = Field(
        None, description=f"Settings that published numbers were made with: {', '.join(PRESETS)}; null: none."
    )
    steps: tuple[Annotated[int, Field(gt=0, le=100_000)], ...] = Field((25,), description="Numbers of sampling steps.")
    guidance: tuple[Annotated[float, Field(ge=0)], ...] = Field((1.0,), description="Guidance scales; 1: no guidance.")
    solver: Literal["euler", "heun", "multistep", "sde", "dopri5", "ddpm", "ddim"] = Field(
        "euler",
        description="euler; heun: two evaluations per step; multistep: second order, one evaluation per step; "
        "sde: Euler-Maruyama; dopri5: chooses the steps of every sample. ddpm, ddim: for models of objective ddpm.",
    )
    ddim_eta: float | None = Field(None, ge=0, le=1, description="ddim: share of noise in the steps; null: 0.")
    sde: SDESection | None = Field(None, description="Settings of the solver sde; null: those of SiT and REPA.")
    guidance_mode: str = Field(
        "constant", description="constant, interval-LO-HI, linear, late, early-R or cfg_star-K-R."
    )
    guidance_channels: Positive | None = Field(
        None, description="Guide the first channels only; null: all. DiT, SiT and LightningDiT guide 3."
    )
    internal_guidance: bool = Field(
        False,
        description="Guide with the model's auxiliary head (diffusion.model.auxiliary_depth) instead of the null "
        "label, without a second evaluation.",
    )
    labels: Labels = Field("equal", description="equal: same number per class; drawn: at random, with the seed.")
    time_shift: TimeShift = Field(
        0.15,
        description="Below 1: more steps near the noise; 1: equal steps. from-dimension: sqrt(4096 / values of a "
        "latent).",
    )
    num_samples: int = Field(50_000, ge=2, description="Samples per setting.")
    batch_size: Positive = Field(125, description="Samples per forward pass; does not change the samples.")
    unit_rows: Positive = Field(500, description="Samples per latent shard and per tar, the unit of resume.")
    precision: Precision = Field("bfloat16", description="float32, bfloat16, or auto: the faster one on this machine.")
    weights: str = Field(
        "ema",
        pattern=WEIGHTS,
        description="ema (the first decay), ema-DECAY, power-SIGMA (see svgpipe ema) or raw.",
    )
    guide_weights: str = Field("ema", pattern=WEIGHTS, description="Weights of the --guide model.")
    compile: Literal["auto"] | bool = Field("auto", description="torch.compile the model. auto: on CUDA.")
    protocol: Annotated[Protocol | None, BeforeValidator(lambda name: None if name == "custom" else name)] = Field(
        None, description=f"Settings that published numbers are measured with: {', '.join(PROTOCOLS)}; null: custom."
    )
    extractor: ExtractorSection = ExtractorSection()
    spaces: dict[SpaceName, str | None] | None = Field(
        None,
        description="Also the Fréchet distance in other spaces: name and weights (a file, or hub). null: none.",
    )
    spatial_distance: bool = Field(False, description="Also sFID, of Inception's features before pooling.")
    inception_in_order: bool = Field(
        False, description="Inception Score over 5,000 images after 5,000, as ADM, not over ten random splits."
    )
    seeds: Positive | None = Field(
        None, description="Number of sweeps with the seeds seed, seed + 1, ...: mean, minimum, deviation; null: one."
    )
    reference_images: int | None = Field(None, ge=2, description="Maximum number of reference images; null: all.")
    bootstrap: Resamplings = Field(100, description="Bootstrap resamplings for the intervals; 0: no intervals.")
    seed: Natural = Field(0, description="Seed of noise, drawn labels and bootstrap.")

    @model_validator(mode="after")
    def _sweep(self) -> Self:
        if self.ddim_eta is not None and self.solver != "ddim":
            raise ValueError(f"ddim_eta belongs to solver ddim, found {self.solver}")
        if self.sde is not None and self.solver != "sde":
            raise ValueError(f"sde holds settings of solver sde, found solver {self.solver}")
        if not self.steps or not self.guidance:
            raise ValueError("steps and guidance must each name at least one value")
        for name, values in (("steps", self.steps), ("guidance", self.guidance)):
            if len({f"{value:g}" for value in values}) != len(values):
                raise ValueError(f"{name} must name no value twice, found {list(values)}")
        return self

    @model_validator(mode="after")
    def _of_inception(self) -> Self:
        for key in ("spatial_distance", "inception_in_order"):
            if getattr(self, key) and self.extractor.kind != "inception":
                raise ValueError(f"{key} needs extractor.kind inception, found {self.extractor.kind}")
        return self

    @property
    def spaces_used(self) -> dict[SpaceName, str]:
        """Weights of the other feature spaces by name; those that were left out (null) are missing."""
        return {name: weights for name, weights in (self.spaces or {}).items() if weights is not None}

    def named_keys(self) -> set[str]:
        """Return the keys that are as the preset or the protocol sets them."""
        values = self._named_values()
        wanted = EvaluationSection.model_validate(values)
        return {key for key in values if getattr(self, key) == getattr(wanted, key)}

    def deviations(self) -> list[str]:
        """Return what differs from the preset and the protocol: `steps: [25] instead of [250]`.

        Files of weights are no deviation.
        """
        values = self._named_values()
        wanted, own = (_without_files(one) for one in (EvaluationSection.model_validate(values), self))
        return [
            f"{key}: {own[key]} instead of {wanted[key]}" for key in wanted if key in values and own[key] != wanted[key]
        ]

    def _named_values(self) -> dict[str, Any]:
        preset = {} if self.preset is None else preset_values(self.preset)
        return preset if self.protocol is None else {**preset, **protocol_values(self.protocol)}


def _without_files(section: EvaluationSection) -> dict[str, Any]:
    values = section.model_dump(mode="json")
    spaces = None if section.spaces is None else sorted(section.spaces_used)
    return values | {"extractor": section.extractor.kind, "spaces": spaces}


class ReconstructionSection(Section):
    """`svgpipe eval-reconstruction`: reconstruction of held-out images."""

    num_images: int | None = Field(None, ge=2, description="Maximum number of held-out images; null: all.")
    batch_size: Positive = Field(32, description="Images per forward pass.")
    unit_rows: Positive = Field(500, description="Images per tar, the unit of resume.")
    extractor: ExtractorSection = ExtractorSection()
    noise: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        None,
        description="Also rebuild from latents with Gaussian noise of these deviations, in deviations of the channel; "
        "null: half of autoencoder.decoder_noise, if the decoder was trained with noise.",
    )
    vgg_weights: str = Field("hub", description="LPIPS: torchvision's VGG16 file (.pth), or hub: download it.")
    lpips_weights: str = Field("hub", description="LPIPS v0.1 vgg.pth, or hub: download it.")
    bootstrap: Resamplings = Field(100, description="Bootstrap resamplings for the intervals; 0: no intervals.")
    seed: Natural = Field(0, description="Seed of the bootstrap.")

    @model_validator(mode="after")
    def _noise_once(self) -> Self:
        if self.noise is not None and len({f"{noise:g}" for noise in self.noise}) < len(self.noise):
            raise ValueError(f"noise must name no value twice, found {list(self.noise)}")
        return self
