"""Imports a released diffusion transformer: SVG, DiT, SiT, REPA or LightningDiT."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from torch import Tensor

from svgpipe.manifests.checkpoint import save_tensors
from svgpipe.manifests.diffusion_section import DiffusionSection, DiTSection
from svgpipe.manifests.errors import ArtifactError, MismatchError, UsageError
from svgpipe.manifests.filesystem import Location
from svgpipe.manifests.manifest import InputRef, digest, summarise
from svgpipe.manifests.model_manifests import (
    OFFICIAL_LATENTS,
    RAW,
    STATISTICS_FILE,
    AutoencoderManifest,
    DiffusionManifest,
    System,
    average_name,
    weights_file,
)
from svgpipe.manifests.workdir import StageSpec, WorkDir
from svgpipe.models.convert import require_fit
from svgpipe.models.dit import DiT
from svgpipe.models.official import ROTATIONS, DiTSizes, dit_sizes, heads_of
from svgpipe.models.official_transformer import numbered_through, system_of, transformer_of
from svgpipe.models.official_vae import is_kl_autoencoder

from ..networks.diffusion import build_dit
from .imported import Imported, as_input, beside
from .official_files import read_official, tensors_of

OFFICIAL_EMA = 0.9999
SD_FACTOR = 0.18215  # that DiT, SiT and REPA multiply latents of SD-VAE by
# The official EMA also averages the fixed position table, and rounding changes it: by 1.7e-4 after 5,000 steps, then no
# further. The averaged table is kept, because the official sampler uses it.
# Files in bfloat16 round it, by up to 4e-3.
POSITION_DRIFT = 5e-3
STATISTICS = ("mean", "std")
# How each system was trained, beside the sizes of its model.
TRAINED: dict[System, dict[str, Any]] = {
    "svg": {},
    "dit": {"objective": "ddpm"},
    "sit": {"time_shift": 1.0, "sample_shift": 1.0},
    "repa": {"time_shift": 1.0, "sample_shift": 1.0},
    "lightningdit": {"time_shift": 1.0, "sample_shift": 0.3, "logit_normal_time": True, "cosine_loss": True},
}


@dataclass(frozen=True)
class DiffusionFiles:
    """What the user gives to import a transformer.

    Attributes:
        transformer: checkpoint: `ema`, `model` or a bare state dict.
        stats: mean and standard deviation per channel; None: `factor`.
        factor: that latents were multiplied by; None: that of SD-VAE, for DiT, SiT and REPA.
        class_names: in label order; None: numbers.
        system: whose transformer it is; None: as its keys say.
        heads: attention heads; None: as its keys or the published width say.
    """

    transformer: Path
    stats: Path | None = None
    factor: float | None = None
    class_names: list[str] | None = None
    system: System | None = None
    heads: int | None = None


def import_diffusion(files: DiffusionFiles, autoencoder: Location, out: Location) -> Imported:
    """Convert a released transformer and publish it at `out`.

    Args:
        files: official files, and what they do not say.
        autoencoder: of its latents, imported before.
        out: directory of the model.

    Returns:
        What was imported.

    Raises:
        ArtifactError: a file is missing, unsafe, of another system, or has unknown keys.
        MismatchError: the autoencoder has latents of another shape.
        UsageError: what the files do not say was not given.
    """
    path = files.transformer
    checkpoint = read_official(path)
    states = _states(path, checkpoint)
    one = next(iter(states.values()))
    system = _system(path, one, files.system)
    sizes = _sizes(path, one, system, files.heads)
    encoder = AutoencoderManifest.read(autoencoder)
    _require_same_latents(path, sizes, encoder)
    classes = _classes(path, sizes, files.class_names)
    config, model = _transformer(path, sizes, system)
    weights, ignored = _weight_files(path, states, model, system)
    weights[STATISTICS_FILE] = _statistics(files, system, sizes.in_channels)
    inputs = _inputs(files, encoder.as_input(autoencoder), classes)
    with WorkDir(StageSpec(out, DiffusionManifest, config.model_dump(mode="json"), inputs)) as work:
        manifest = work.finished
        if manifest is None:
            imported = DiffusionManifest(
                steps=0,
                grid=(sizes.grid, sizes.grid),
                channels=sizes.in_channels,
                class_names=classes,
                content={file: save_tensors(out / file, tensors) for file, tensors in weights.items()},
                num_parameters=sum(p.numel() for p in model.parameters()),
                origin=f"{path.name}, sha256 {inputs['official'].fingerprint}",
            )
            manifest = work.publish(imported)
    hint = "" if "ema" in states else "; may or may not be EMA weights: sample with --ema raw"
    what = f"{_named(system, sizes)}, {sizes.num_classes} classes, weights {' and '.join(states)}{hint}"
    used = sum(map(len, states.values())) - sum(map(len, ignored.values()))
    return Imported(out, manifest.fingerprint, what, used, {**ignored, **beside(checkpoint, [*states, "state_dict"])})


def _states(path: Path, checkpoint: Any) -> dict[str, dict[str, Tensor]]:
    """Return the state dicts of a checkpoint: `ema`, `model` or both. A bare one may or may not hold EMA weights."""
    held = checkpoint if isinstance(checkpoint, dict) else {}
    names = [name for name in ("ema", "model") if isinstance(held.get(name), dict)]
    if not names:
        return {"model": tensors_of(path, checkpoint, "state_dict")}
    return {name: tensors_of(path, checkpoint[name]) for name in names}


def _system(path: Path, state: dict[str, Tensor], given: System | None) -> System:
    """Return the system of a transformer.

    Raises:
        ArtifactError: it is no transformer, or looks like one of another system than given.
        UsageError: it may be of two systems, and none was given.
    """
    found = system_of(state)
    if found is None:
        hint = " It looks like a KL autoencoder: give it as --autoencoder." if is_kl_autoencoder(state) else ""
        raise ArtifactError(f"{path}: expected a diffusion transformer, found no label table in it.{hint}")
    if given is None:
        if " or " in found:
            raise UsageError(f"{path}: may be a file of {found}, which look the same. Say which with --system.")
        return cast(System, found)
    if given not in found.split(" or "):
        raise ArtifactError(f"{path}: expected a transformer of {given}, found one that looks like {found}.")
    return given


def _sizes(path: Path, state: dict[str, Tensor], system: System, heads: int | None) -> DiTSizes:
    """Return the sizes of a transformer.

    Raises:
        UsageError: the number of heads is not given, or impossible.
        ArtifactError: the tensors are not those of a transformer.
    """
    try:
        width, in_file = heads_of(state)
        if heads is None and in_file is None:
            raise UsageError(f"{path}: its file does not show the number of attention heads. Add --heads N.")
        if heads is not None and (width % heads or in_file not in (None, heads)):
            expected = f"a divisor of the width {width}" if in_file is None else f"{in_file}, as the file shows"
            raise UsageError(f"--heads {heads}: expected {expected}.")
        return dit_sizes(numbered_through(state), heads)
    except ValueError as error:
        raise ArtifactError(f"{path}: not a diffusion transformer of {system}: {error}") from error


def _named(system: System, sizes: DiTSizes) -> str:
    title = {"svg": "SVG's DiT", "dit": "DiT", "sit": "SiT", "repa": "REPA's SiT", "lightningdit": "LightningDiT"}
    unused = " with the unused sigma half" if sizes.learn_sigma and system != "dit" else ""
    return f"{title[system]} {sizes.name}{unused}"


def _classes(path: Path, sizes: DiTSizes, given: list[str] | None) -> list[str]:
    """Return the given names, or numbers.

    Raises:
        ArtifactError: the number of names differs from that of the labels.
    """
    classes = given if given is not None else [str(label) for label in range(sizes.num_classes)]
    if len(classes) != sizes.num_classes:
        raise ArtifactError(
            f"{path}: its label table has {sizes.num_classes + 1} rows, the last one for 'no class'; expected "
            f"{sizes.num_classes} class names, found {len(classes)}. (Without label dropout there is no such row. "
            "Such a model cannot be guided and is not imported.)"
        )
    return classes


def _transformer(path: Path, sizes: DiTSizes, system: System) -> tuple[DiffusionSection, DiT]:
    """Return the recipe section for a transformer of these sizes, and a new transformer.

    Raises:
        ArtifactError: the sizes are invalid.
    """
    try:
        model = DiTSection.model_validate(sizes, from_attributes=True)
        section = DiffusionSection(model=model, ema_decays=(OFFICIAL_EMA,), **TRAINED[system])
        grid = (sizes.grid, sizes.grid)
        return section, build_dit(section, grid=grid, channels=sizes.in_channels, num_classes=sizes.num_classes)
    except ValueError as error:
        problem = summarise(error) if isinstance(error, ValidationError) else error
        raise ArtifactError(f"{path}: invalid sizes: {problem}") from error


def _weight_files(
    path: Path, states: dict[str, dict[str, Tensor]], model: DiT, system: System
) -> tuple[dict[str, dict[str, Tensor]], dict[str, list[str]]]:
    """Return tensors by file name, and unused keys by reason.

    Raises:
        ArtifactError: weights do not fit `model`.
    """
    files: dict[str, dict[str, Tensor]] = {}
    ignored: dict[str, list[str]] = {}
    for name, state in states.items():
        official = transformer_of(state, system)
        for reason, keys in official.ignored.items():
            ignored.setdefault(reason, []).extend(keys)
        try:
            require_fit(name, model.state_dict(), official.state)
        except ValueError as error:
            raise ArtifactError(f"{path}: {error}") from error
        _require_tables(path, name, model, state)
        files[weights_file(average_name(OFFICIAL_EMA) if name == "ema" else RAW)] = official.state
    return files, ignored


def _require_tables(path: Path, name: str, model: DiT, state: dict[str, Tensor]) -> None:
    """Check that fixed tables of a file are those of the model.

    Raises:
        ArtifactError: one is not.
    """
    tables = {"pos_embed": model.pos_embed}
    if model.rotary is not None:
        tables |= dict(zip(ROTATIONS, (model.rotary.cos, model.rotary.sin), strict=True))
    for key, table in tables.items():
        if key not in state or state[key].shape != table.shape:
            raise ArtifactError(f"{path}: {name}: {key}: expected a table of {tuple(table.shape)}.")
        if not torch.allclose(table, state[key], atol=POSITION_DRIFT):
            raise ArtifactError(f"{path}: {name}: {key} is not an official table of positions.")


def _inputs(files: DiffusionFiles, autoencoder: InputRef, classes: list[str]) -> dict[str, InputRef]:
    """Return the inputs of the model. Latents of the autoencoder with these statistics replace a cache."""
    if files.stats is not None:
        measured = as_input(files.stats, "official-statistics")
    else:
        factor = files.factor or SD_FACTOR
        config = {"factor": factor}
        measured = InputRef(kind="official-statistics", fingerprint=digest(factor), path="", config=config)
    latents = InputRef(
        kind=OFFICIAL_LATENTS,
        fingerprint=digest([autoencoder.fingerprint, measured.fingerprint]),
        path=measured.path,
        config={},
        inputs={"autoencoder": autoencoder, "statistics": measured},
    )
    named = InputRef(kind="class-names", fingerprint=digest(classes), path="", config={})
    return {"cache": latents, "official": as_input(files.transformer, "official-diffusion"), "class_names": named}


def _require_same_latents(path: Path, sizes: DiTSizes, encoder: AutoencoderManifest) -> None:
    """Check that transformer and autoencoder have latents of the same shape.

    Raises:
        MismatchError: they have not.
    """
    if (sizes.grid, sizes.grid, sizes.in_channels) != (*encoder.grid, encoder.channels):
        sized = " (--image-size sets the size of a KL autoencoder)" if encoder.posterior_channels else ""
        raise MismatchError(
            f"{path}: its latents are {sizes.grid}x{sizes.grid}x{sizes.in_channels}, those of the autoencoder "
            f"{'x'.join(map(str, (*encoder.grid, encoder.channels)))}{sized}. Import the transformer with the "
            "autoencoder that it was trained with."
        )


def _statistics(files: DiffusionFiles, system: System, channels: int) -> dict[str, Tensor]:
    """Return channel_mean and channel_std, (C,).

    Raises:
        UsageError: neither statistics nor a factor for a system that has none of its own.
        ArtifactError: another number of channels, or an invalid value.
    """
    if files.stats is None:
        if files.factor is None and system in ("svg", "lightningdit"):
            name = "dinov3_sp_stats.pt" if system == "svg" else "latents_stats.pt"
            raise UsageError(f"--diffusion and --stats belong together for {system}: give its {name}.")
        std = torch.full((channels,), 1 / (files.factor or SD_FACTOR))
        return {"channel_mean": torch.zeros(channels), "channel_std": std}
    tensors = tensors_of(files.stats, read_official(files.stats))
    path = files.stats
    keys = {name: [key for key in tensors if key.endswith(f"_{name}") or key == name] for name in STATISTICS}
    if len(tensors) != 2 or any(len(matching) != 1 for matching in keys.values()):
        raise ArtifactError(f"{path}: expected a mean and a std, found {', '.join(tensors)}.")
    mean, std = (tensors[keys[name][0]].flatten() for name in STATISTICS)
    if len(mean) != channels or len(std) != channels:
        raise ArtifactError(f"{path}: expected statistics of {channels} channels, found {len(mean)} and {len(std)}.")
    if not (mean.is_floating_point() and std.is_floating_point()):
        raise ArtifactError(f"{path}: expected statistics in floating point, found {mean.dtype} and {std.dtype}.")
    if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
        raise ArtifactError(f"{path}: a statistic is not finite, or a standard deviation not positive.")
    return {"channel_mean": mean.contiguous(), "channel_std": std.contiguous()}
