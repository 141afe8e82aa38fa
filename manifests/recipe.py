"""Recipes: what to build, one section per stage, as YAML parsed into frozen models.

A recipe is found by name (built in) or by file. `--set section.key=value` overrides single values.
A file may begin with `extends: NAME|FILE` and then only say what differs.
Unknown keys are refused with the nearest valid name. Defaults live here and nowhere else.
"""

from __future__ import annotations

import contextlib
import difflib
import types
import typing
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self, Union

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from svgpipe.manifests.errors import UsageError

Precision = Literal["float32", "bfloat16"]
Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ShardSection(Section):
    """`svgpipe shard`: image folder → WebDataset tars."""

    images_per_shard: Positive = 1000
    holdout: Fraction = Field(0.0, description="Fraction of every class kept out of all training.")
    crop: Positive | None = Field(
        None, description="Store ADM centre crops of this side as PNG; null keeps the original bytes."
    )
    max_pixels: int = Field(
        178_956_970, gt=0, le=178_956_970, description="Larger images are rejected as bombs; at most Pillow's limit."
    )
    seed: Natural = Field(0, description="Of the order in which images are spread over shards.")


class BackboneSection(Section):
    """The frozen feature extractor: any timm model."""

    name: str = "vit_small_plus_patch16_dinov3.lvd1689m"
    weights: str = Field(
        "hub", description="hub | random | a .safetensors/.pth file in timm or Meta keys | package:NAME"
    )
    input_size: Positive | None = Field(
        None, description="Pixels per side it sees; null means the image size. Patch-14 models want 224."
    )
    feature_level: int | None = Field(
        None,
        description="CNNs: index into timm's feature_info (negative counts from the end); null for ViTs.",
    )
    seed: Natural = Field(0, description="Of random weights; ignored otherwise.")


class ResidualSection(Section):
    """The residual encoder, a timm VisionTransformer (FACTS: official values are the defaults)."""

    enabled: bool = True
    channels: Positive = 8
    depth: Positive = 6
    width: Positive = 384
    heads: Positive = 8
    mlp_ratio: float = Field(4.0, gt=0)
    dropout: Fraction = 0.1
    mask_ratio: Fraction = Field(0.1, description="Training: chance that a sample's residual is masked whole.")
    align: bool = Field(True, description="Match the residual's distribution to the backbone's.")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        return self


class DecoderSection(Section):
    """The LDM/VA-VAE decoder; its number of levels must fit the stride (levels = len(ch_mult))."""

    ch: Positive = 128
    ch_mult: tuple[Positive, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: Positive = 2
    attention: bool = Field(True, description="At the lowest resolution, as the official decoder has it.")

    @model_validator(mode="after")
    def _groups_divide(self) -> Self:
        bad = [self.ch * m for m in self.ch_mult if self.ch * m % 32]
        if bad:
            raise ValueError(f"GroupNorm has 32 groups, but widths {bad} are not multiples of 32")
        return self


class PerceptualSection(Section):
    """The perceptual term. Which one is used is a choice made here, never a silent fallback."""

    kind: Literal["lpips-vgg", "backbone"] = "lpips-vgg"
    weight: float = Field(1.0, ge=0)
    vgg_weights: str = Field("hub", description="torchvision's VGG16 file (.pth), or hub to download it.")
    lpips_weights: str = Field("hub", description="LPIPS v0.1 vgg.pth, or hub to download it.")
    levels: tuple[int, ...] = Field((0, 1, 2, 3), description="backbone: feature levels that are compared.")


class DiscriminatorSection(Section):
    """PatchGAN with adaptive weight."""

    enabled: bool = True
    start_step: Natural = Field(2500, description="In optimiser steps of the generator.")
    weight: float = Field(0.5, ge=0)
    loss: Literal["hinge", "vanilla"] = "hinge"
    width: Positive = 64
    layers: Positive = 3


class ScheduleSection(Section):
    """Learning rate over steps."""

    warmup_steps: Natural = 0
    kind: Literal["constant", "cosine"] = "constant"
    final_factor: float = Field(0.0, ge=0, le=1, description="cosine: learning rate at the end, relative.")


class AutoencoderSection(Section):
    """`svgpipe train-autoencoder`: residual encoder and decoder beside the frozen backbone."""

    image_size: Positive = 256
    backbone: BackboneSection = BackboneSection()
    residual: ResidualSection = ResidualSection()
    decoder: DecoderSection = DecoderSection()
    perceptual: PerceptualSection = PerceptualSection()
    discriminator: DiscriminatorSection = DiscriminatorSection()
    schedule: ScheduleSection = ScheduleSection()
    steps: Natural = 100_000
    batch_size: Positive = 64
    learning_rate: float = Field(1e-4, gt=0)
    crop: Literal["random", "centre"] = "random"
    flip: bool = False
    precision: Precision = "float32"
    shuffle_buffer: Positive = 2000
    workers: Natural = Field(0, description="Decoding processes beside the training process.")
    seed: Natural = 23
    log_every: Positive = 50
    eval_every: Positive = 2500
    checkpoint_every: Positive = 2500
    calibration_images: Positive = Field(2048, description="Images over which the alignment is frozen.")
    eval_images: Positive = Field(256, description="Held-out images that PSNR is measured on.")

    @model_validator(mode="after")
    def _can_train(self) -> Self:
        if self.perceptual.kind == "backbone" and self.perceptual.weight > 0 and not self.perceptual.levels:
            raise ValueError("perceptual.levels is empty, but perceptual.kind is backbone")
        return self


class ExtractSection(Section):
    """`svgpipe extract`: shard set → feature cache."""

    unit_rows: Positive = Field(256, description="Samples per outer Zarr shard: the unit of work and resume.")
    batch_size: Positive = 64
    precision: Precision = "float32"
    views: tuple[Literal["original", "flip"], ...] = ("original", "flip")
    calibration_images: Positive = Field(4096, description="Evenly spread rows that fix channel mean and std.")
    store_dtype: Literal["float16", "int8"] = "float16"
    compile: bool = Field(False, description="torch.compile the encoder; its features differ in the last bits.")

    @model_validator(mode="after")
    def _views_once(self) -> Self:
        if not self.views or len(set(self.views)) != len(self.views) or self.views[0] != "original":
            raise ValueError(f"views must begin with 'original' and name no view twice, found {list(self.views)}")
        return self


class DiTSection(Section):
    """Size of the diffusion transformer."""

    width: Positive = 384
    depth: Positive = 12
    heads: Positive = 6
    mlp_ratio: float = Field(4.0, gt=0)
    qk_norm: bool = True
    learn_sigma: bool = Field(False, description="True only to match official files: half the head is unused.")

    @model_validator(mode="after")
    def _shapes(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        if self.width % 4:
            raise ValueError(f"width {self.width} is not a multiple of 4, which the 2-D position table needs")
        return self


class DiffusionSection(Section):
    """`svgpipe train-diffusion`: the diffusion transformer, from the cache alone."""

    model: DiTSection = DiTSection()
    schedule: ScheduleSection = ScheduleSection()
    steps: Positive = 400_000
    batch_size: Positive = 256
    learning_rate: float = Field(1e-4, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    accumulate: Positive = Field(1, description="Parts that a batch is computed in; gradients are averaged.")
    ema_decays: tuple[Fraction, ...] = Field(
        (0.9999,), description="Averages of the weights, side by side; the first is the one that is looked at."
    )
    label_dropout: Fraction = 0.1
    time_shift: float = Field(0.4, gt=0, description="Below 1 pushes training times towards noise.")
    clip_grad_norm: float | None = Field(None, gt=0)
    precision: Precision = "bfloat16"
    compile: Literal["auto"] | bool = Field("auto", description="torch.compile the model; auto: on CUDA.")
    activation_checkpointing: bool = Field(False, description="Compute blocks twice, to hold less in memory.")
    use_flips: bool = Field(True, description="Draw each sample's view at random, where the cache has flips.")
    read_ahead: Positive = Field(4, description="Batches whose reads are in flight.")
    seed: Natural = 1234
    log_every: Positive = 100
    eval_every: Positive = 5000
    eval_rows: Positive = 1024
    checkpoint_every: Positive = 5000
    keep_checkpoints: Positive = Field(2, description="Newest ones, from which a run resumes.")
    keep_every: Positive | None = Field(None, description="Keep those at multiples of so many steps for ever.")
    sample_every: Positive = Field(10_000, description="Grids, only where an autoencoder is given.")
    quality_every: Positive = Field(10_000, description="Distance and class accuracy of samples in latent space.")
    quality_samples: int = Field(1024, ge=0, description="Samples that these are measured on; 0: never.")
    quality_rows: int = Field(8192, ge=2, description="Cached rows that they are measured against.")
    sample_steps: Positive = Field(25, description="Of grids and of what quality is measured on.")
    sample_shift: float = Field(0.15, gt=0)

    @model_validator(mode="after")
    def _averages_and_parts(self) -> Self:
        if not self.ema_decays or len(set(self.ema_decays)) != len(self.ema_decays):
            raise ValueError(f"ema_decays must name at least one value and none twice, found {list(self.ema_decays)}")
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate {self.accumulate} is more than batch_size {self.batch_size}")
        return self


class ExtractorSection(Section):
    """What distances are measured with."""

    kind: Literal["inception", "backbone"] = "inception"
    weights: str = Field("hub", description="inception: torch-fidelity's file, or hub to download it.")


class EvaluationSection(Section):
    """`svgpipe sample-and-eval`: a sweep of steps × guidance, decoded and measured."""

    steps: tuple[Positive, ...] = (25,)
    guidance: tuple[float, ...] = (1.0,)
    solver: Literal["euler", "heun"] = "euler"
    guidance_mode: str = "constant"
    time_shift: float = Field(0.15, gt=0)
    num_samples: int = Field(50_000, ge=2)
    batch_size: Positive = 125
    unit_rows: Positive = Field(500, description="Samples per latent shard and per tar: the unit of resume.")
    precision: Precision = "bfloat16"
    weights: str = Field(
        "ema",
        pattern=r"^(raw|ema|(ema-)?0(\.\d+)?)$",
        description="ema (the first average), ema-DECAY or raw.",
    )
    extractor: ExtractorSection = ExtractorSection()
    reference_images: int | None = Field(None, ge=2, description="At most this many, evenly spread; null: all.")
    seed: Natural = 0

    @model_validator(mode="after")
    def _sweep(self) -> Self:
        if not self.steps or not self.guidance:
            raise ValueError("steps and guidance must each name at least one value")
        for name, values in (("steps", self.steps), ("guidance", self.guidance)):
            if len({f"{value:g}" for value in values}) != len(values):
                raise ValueError(f"{name} must name no value twice, found {list(values)}")
        return self


class Recipe(Section):
    """One section per stage, plus where the images come from."""

    name: str = "custom"
    source: str | None = Field(None, description="Image folder, or demo-photographs.")
    shard: ShardSection = ShardSection()
    autoencoder: AutoencoderSection = AutoencoderSection()
    extract: ExtractSection = ExtractSection()
    diffusion: DiffusionSection = DiffusionSection()
    evaluation: EvaluationSection = EvaluationSection()


def builtin_names() -> list[str]:
    """Names of the recipes that come with svgpipe."""
    folder = resources.files("svgpipe.manifests").joinpath("recipes")
    return sorted(Path(item.name).stem for item in folder.iterdir() if item.name.endswith(".yaml"))


def load_recipe(name_or_file: str | None, overrides: Sequence[str] = ()) -> Recipe:
    """Load a built-in recipe or a YAML file (None: all defaults) and apply `section.key=value` overrides.

    Raises:
        UsageError: no such recipe or file, not YAML, an unknown key (with the nearest valid one), or a
            value that cannot work.
    """
    raw, where = _read_with_base(name_or_file) if name_or_file is not None else ({}, "--set")
    for override in overrides:
        _apply_override(raw, override)
    _refuse_unknown_keys(raw, Recipe, where)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, e['loc'])) or 'recipe'}: {e['msg'].removeprefix('Value error, ')}, "
            f"found {_brief(e['input'])}"
            for e in error.errors()
        ]
        raise UsageError(f"{where}: the recipe cannot work:\n  " + "\n  ".join(lines)) from error


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _read_with_base(name_or_file: str, seen: tuple[str, ...] = ()) -> tuple[dict[str, Any], str]:
    raw, where = _read_source(name_or_file)
    base_name = raw.pop("extends", None)
    if base_name is None:
        return raw, where
    if base_name in seen or not isinstance(base_name, str):
        raise UsageError(f"{where}: extends: expected another recipe, found {base_name!r}.")
    base, _ = _read_with_base(base_name, (*seen, base_name))
    return _merge(base, raw), where


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        merged[key] = _merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def _read_source(name_or_file: str) -> tuple[dict[str, Any], str]:
    builtin = resources.files("svgpipe.manifests").joinpath("recipes", f"{name_or_file}.yaml")
    path = Path(name_or_file)
    if path.suffix in {".yaml", ".yml"}:
        if not path.is_file():
            raise UsageError(f"{path}: expected a recipe file, found none.")
        text, where = path.read_text(errors="replace"), str(path)
    elif "/" not in name_or_file and builtin.is_file():
        text, where = builtin.read_text(), f"recipe {name_or_file}"
    else:
        names = builtin_names()
        near = difflib.get_close_matches(name_or_file, names, 1, 0.3)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UsageError(f"recipe {name_or_file!r}: expected one of {', '.join(names)} or a .yaml file.{hint}")
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{where}: expected YAML, found something else: {error}") from error
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise UsageError(f"{where}: expected sections with keys, found {type(raw).__name__}.")
    return raw, where


def _apply_override(raw: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator or not name:
        raise UsageError(f"--set {override!r}: expected section.key=value, for example diffusion.steps=1000.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {override!r}: the value is not YAML: {error}") from error
    target = raw
    *sections, key = name.split(".")
    for section in sections:
        inner = target.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UsageError(f"--set {override!r}: {section} holds a value, not a section.")
        target = inner
    # YAML 1.1 reads 1e-4 as a string; numbers written so are meant as numbers.
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    target[key] = value


def _refuse_unknown_keys(raw: dict[str, Any], model: type[BaseModel], where: str, prefix: str = "") -> None:
    for key, value in raw.items():
        field = model.model_fields.get(key) if isinstance(key, str) else None
        if field is None:
            names = list(model.model_fields)
            near = difflib.get_close_matches(str(key), names, 1, 0.4)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"expected one of {', '.join(names)}."
            raise UsageError(f"{where}: unknown key {prefix}{key}; {hint}")
        inner = _section_of(field.annotation)
        if inner is not None:
            if not isinstance(value, dict):
                raise UsageError(f"{where}: {prefix}{key}: expected a section with keys, found {_brief(value)}.")
            _refuse_unknown_keys(value, inner, where, f"{prefix}{key}.")


def _section_of(annotation: object) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if typing.get_origin(annotation) in (Union, types.UnionType):
        for option in typing.get_args(annotation):
            if (found := _section_of(option)) is not None:
                return found
    return None
