"""`svgpipe import-official`: convert released SVG checkpoints to an autoencoder and a diffusion model.

OUT/autoencoder    residual encoder, decoder, mask token and backbone. No alignment: the official code aligns every
                   batch by itself, so the first extraction or evaluation measures the four scalars
OUT/diffusion      the transformer, with the official statistics of its latents
OUT/import.json    used and unused keys, with reasons

A key without a place is an error. No code in a file is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from svgpipe.manifests.checkpoint import save_tensors
from svgpipe.manifests.errors import ArtifactError, MismatchError, UsageError
from svgpipe.manifests.filesystem import Location, file_sha256
from svgpipe.manifests.manifest import InputRef, digest, read_json, summarise, write_json
from svgpipe.manifests.model_manifests import (
    AUTOENCODER_FILE,
    BACKBONE_FILE,
    OFFICIAL_LATENTS,
    RAW,
    STATISTICS_FILE,
    AutoencoderManifest,
    DiffusionManifest,
    average_name,
    weights_file,
)
from svgpipe.manifests.recipe import (
    AutoencoderSection,
    BackboneSection,
    DecoderSection,
    DiffusionSection,
    DiTSection,
    ResidualSection,
)
from svgpipe.manifests.workdir import StageSpec, WorkDir
from svgpipe.models.convert import decoder_from_official, require_fit, residual_from_official
from svgpipe.models.dit import DiT
from svgpipe.models.official import (
    DiTSizes,
    backbone_name,
    decoder_sizes,
    dit_sizes,
    residual_sizes,
    split_autoencoder,
)

from ..networks.autoencoder import build_autoencoder, state_digest
from ..networks.diffusion import build_dit
from .official_files import read_official, tensors_of

IMPORT_NAME = "import.json"
OFFICIAL_EMA = 0.9999
# The official EMA also averages the fixed position table, and rounding changes it: by 1.7e-4 after 5,000 steps, then no
# further. The averaged table is kept, because the official sampler uses it.
POSITION_DRIFT = 1e-3
STATISTICS = ("mean", "std")


@dataclass(frozen=True)
class Imported:
    """Result of importing one file."""

    directory: Location
    fingerprint: str
    what: str
    used: int
    ignored: dict[str, list[str]]  # keys by reason


def import_official(
    autoencoder: Path,
    out: Location,
    *,
    diffusion: Path | None = None,
    stats: Path | None = None,
    class_names: list[str] | None = None,
) -> list[Imported]:
    """Convert official files; run again to find finished work.

    Args:
        autoencoder: Lightning checkpoint of the autoencoder.
        out: directory for `autoencoder` and `diffusion`.
        diffusion: checkpoint of the transformer: `ema`, `model` or a bare state dict.
        stats: dinov3_sp_stats.pt; required for a transformer.
        class_names: class names of the transformer in label order; None: numbers.

    Returns:
        One result per imported file.

    Raises:
        UsageError: a transformer without statistics, or the reverse.
        ArtifactError: files that are missing, unsafe, or have unknown keys.
        MismatchError: `out` holds another import, or the latents of transformer and autoencoder differ in shape.
    """
    if diffusion is None and class_names is not None:
        raise UsageError("--class-names are names of the transformer's labels: give --diffusion as well.")
    if (diffusion is None) != (stats is None):
        raise UsageError(
            "--diffusion and --stats belong together: the statistics normalise the latents of the transformer."
        )
    imports = [_import_autoencoder(autoencoder, out / "autoencoder")]
    if diffusion is not None and stats is not None:
        imports.append(_import_diffusion(diffusion, stats, out / "autoencoder", out / "diffusion", class_names))
    listing = [{"directory": one.directory.name, "used": one.used, "ignored": one.ignored} for one in imports]
    now = {entry["directory"] for entry in listing}
    earlier = read_json(out / IMPORT_NAME)["imported"] if (out / IMPORT_NAME).exists() else []
    write_json(out / IMPORT_NAME, {"imported": listing + [one for one in earlier if one["directory"] not in now]})
    return imports


def _import_autoencoder(path: Path, out: Location) -> Imported:
    checkpoint = read_official(path)
    state = tensors_of(path, checkpoint, "state_dict")
    try:
        parts = split_autoencoder(state)
        residual, decoder = residual_sizes(parts.extra_vit), decoder_sizes(parts.decoder)
        name = backbone_name(parts.encoder)
        config = AutoencoderSection(
            image_size=int(residual["image_size"]),
            backbone=BackboneSection(name=name, weights="beside"),
            residual=ResidualSection.model_validate(
                {key: residual[key] for key in ("channels", "depth", "width", "heads", "mlp_ratio")}
            ),
            decoder=DecoderSection.model_validate(decoder, from_attributes=True),
            steps=0,
        )
        model = build_autoencoder(config.model_copy(update={"backbone": BackboneSection(name=name, weights="random")}))
        model.backbone.load(parts.encoder)
        own = model.trained_state()
        model.load_trained_state(
            {
                "mask_token": parts.mask_token.reshape(own["mask_token"].shape),
                **{f"residual.{k}": v for k, v in residual_from_official(parts.extra_vit).items()},
                **{f"decoder.{k}": v for k, v in decoder_from_official(parts.decoder).items()},
                **{k: v for k, v in own.items() if k.startswith("alignment.")},  # measured later
            }
        )
    except (ValueError, RuntimeError, UsageError) as error:
        raise ArtifactError(f"{path}: {error}") from error
    source = _as_input(path, "official-autoencoder")
    with WorkDir(StageSpec(out, AutoencoderManifest, config.model_dump(mode="json"), {"official": source})) as work:
        manifest = work.finished
        if manifest is None:
            save_tensors(out / BACKBONE_FILE, parts.encoder)
            imported = AutoencoderManifest(
                steps=0,
                image_size=config.image_size,
                grid=(model.backbone.grid, model.backbone.grid),
                frozen_channels=model.backbone.channels,
                residual_channels=model.channels - model.backbone.channels,
                backbone_weights=state_digest(model.backbone.state_dict()),
                alignment=None,
                content=save_tensors(out / AUTOENCODER_FILE, model.trained_state()),
                origin=f"{path.name}, sha256 {source.fingerprint}",
            )
            manifest = work.publish(imported)
    count = sum(map(len, (parts.encoder, parts.extra_vit, parts.decoder))) + 1
    what = f"autoencoder for {manifest.image_size} pixels, {name}, {manifest.residual_channels} residual channels"
    return Imported(out, manifest.fingerprint, what, count, {**parts.ignored, **_beside(checkpoint, ["state_dict"])})


def _import_diffusion(
    path: Path, stats: Path, autoencoder: Location, out: Location, class_names: list[str] | None
) -> Imported:
    checkpoint = read_official(path)
    held = checkpoint if isinstance(checkpoint, dict) else {}
    names = [name for name in ("ema", "model") if isinstance(held.get(name), dict)]
    # A bare state dict may or may not hold EMA weights.
    states = {name: tensors_of(path, checkpoint[name]) for name in names} or {
        "model": tensors_of(path, checkpoint, "state_dict")
    }
    try:
        sizes = dit_sizes(next(iter(states.values())))
    except ValueError as error:
        raise ArtifactError(f"{path}: not a diffusion transformer of SVG: {error}") from error
    encoder = AutoencoderManifest.read(autoencoder)
    _require_same_latents(path, sizes, encoder)
    classes = _classes(path, sizes, class_names)
    config, model = _transformer(path, sizes)
    files = _weight_files(path, states, model)
    files[STATISTICS_FILE] = _statistics(stats, sizes.in_channels)
    inputs = _diffusion_inputs(path, stats, encoder.as_input(autoencoder), classes)
    with WorkDir(StageSpec(out, DiffusionManifest, config.model_dump(mode="json"), inputs)) as work:
        manifest = work.finished
        if manifest is None:
            imported = DiffusionManifest(
                steps=0,
                grid=(sizes.grid, sizes.grid),
                channels=sizes.in_channels,
                class_names=classes,
                content={file: save_tensors(out / file, tensors) for file, tensors in files.items()},
                num_parameters=sum(p.numel() for p in model.parameters()),
                origin=f"{path.name}, sha256 {inputs['official'].fingerprint}",
            )
            manifest = work.publish(imported)
    sigma = " with the unused sigma half" if sizes.learn_sigma else ""
    hint = "" if "ema" in states else "; may or may not be EMA weights: sample with --ema raw"
    what = f"DiT {sizes.name}{sigma}, {sizes.num_classes} classes, weights {' and '.join(states)}{hint}"
    aside = _beside(checkpoint, names or ["state_dict"])
    return Imported(out, manifest.fingerprint, what, sum(map(len, states.values())), aside)


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


def _transformer(path: Path, sizes: DiTSizes) -> tuple[DiffusionSection, DiT]:
    """Return the recipe section for a transformer of these sizes, and a new transformer.

    Raises:
        ArtifactError: the sizes are invalid.
    """
    try:
        section = DiTSection.model_validate(sizes, from_attributes=True)
        grid = (sizes.grid, sizes.grid)
        model = build_dit(section, grid=grid, channels=sizes.in_channels, num_classes=sizes.num_classes)
    except ValueError as error:
        problem = summarise(error) if isinstance(error, ValidationError) else error
        raise ArtifactError(f"{path}: invalid sizes: {problem}") from error
    return DiffusionSection(model=section, ema_decays=(OFFICIAL_EMA,)), model


def _weight_files(path: Path, states: dict[str, dict[str, Tensor]], model: DiT) -> dict[str, dict[str, Tensor]]:
    """Return tensors by file name.

    Raises:
        ArtifactError: weights do not fit `model`.
    """
    files = {}
    for name, state in states.items():
        try:
            require_fit(name, model.state_dict(), state)
        except ValueError as error:
            raise ArtifactError(f"{path}: {error}") from error
        if not torch.allclose(model.pos_embed, state["pos_embed"], atol=POSITION_DRIFT):
            raise ArtifactError(f"{path}: {name}: pos_embed is not an official DiT's sine-cosine table.")
        files[weights_file(average_name(OFFICIAL_EMA) if name == "ema" else RAW)] = state
    return files


def _diffusion_inputs(path: Path, stats: Path, autoencoder: InputRef, classes: list[str]) -> dict[str, InputRef]:
    """Return the inputs of the model. Latents of the autoencoder with these statistics replace a cache."""
    measured = _as_input(stats, "official-statistics")
    latents = InputRef(
        kind=OFFICIAL_LATENTS,
        fingerprint=digest([autoencoder.fingerprint, measured.fingerprint]),
        path=str(stats),
        config={},
        inputs={"autoencoder": autoencoder, "statistics": measured},
    )
    named = InputRef(kind="class-names", fingerprint=digest(classes), path="", config={})
    return {"cache": latents, "official": _as_input(path, "official-diffusion"), "class_names": named}


def _require_same_latents(path: Path, sizes: DiTSizes, encoder: AutoencoderManifest) -> None:
    """Check that transformer and autoencoder have latents of the same shape.

    Raises:
        MismatchError: they have not.
    """
    channels = encoder.frozen_channels + encoder.residual_channels
    if (sizes.grid, sizes.grid, sizes.in_channels) != (*encoder.grid, channels):
        raise MismatchError(
            f"{path}: its latents are {sizes.grid}x{sizes.grid}x{sizes.in_channels}, those of the autoencoder "
            f"{'x'.join(map(str, (*encoder.grid, channels)))}. Import the transformer with the autoencoder that it was "
            "trained with."
        )


def _beside(checkpoint: object, used: list[str]) -> dict[str, list[str]]:
    """Return the unused entries of a checkpoint by reason, without keys of weights."""
    if not (isinstance(checkpoint, dict) and any(name in checkpoint for name in used)):
        return {}  # a bare state dict
    others = [str(name) for name in checkpoint if name not in used]
    return {"training state, which is not imported": others} if others else {}


def _statistics(path: Path, channels: int) -> dict[str, Tensor]:
    """Return channel_mean and channel_std, (C,).

    Raises:
        ArtifactError: another number of channels, or an invalid value.
    """
    tensors = tensors_of(path, read_official(path))
    keys = {name: [key for key in tensors if key.endswith(f"_{name}") or key == name] for name in STATISTICS}
    if len(tensors) != 2 or any(len(matching) != 1 for matching in keys.values()):
        raise ArtifactError(f"{path}: expected dinov3_sp_mean and dinov3_sp_std, found {', '.join(tensors)}.")
    mean, std = (tensors[keys[name][0]].flatten() for name in STATISTICS)
    if len(mean) != channels or len(std) != channels:
        raise ArtifactError(f"{path}: expected statistics of {channels} channels, found {len(mean)} and {len(std)}.")
    if not (mean.is_floating_point() and std.is_floating_point()):
        raise ArtifactError(f"{path}: expected statistics in floating point, found {mean.dtype} and {std.dtype}.")
    if not (torch.isfinite(mean).all() and torch.isfinite(std).all() and (std > 0).all()):
        raise ArtifactError(f"{path}: a statistic is not finite, or a standard deviation not positive.")
    return {"channel_mean": mean.contiguous(), "channel_std": std.contiguous()}


def _as_input(path: Path, kind: str) -> InputRef:
    return InputRef(kind=kind, fingerprint=file_sha256(path), path=str(path), config={})
