"""`svgpipe import-official`: released SVG checkpoints → an autoencoder and a diffusion model of ours.

OUT/autoencoder    residual encoder, decoder, mask token; the backbone beside them. No alignment yet: the official code
                   aligns every batch by itself, so the first extraction or evaluation measures the four scalars
OUT/diffusion      the transformer, with the official statistics, sampling from official latents
OUT/import.json    which keys were used and which left aside, and why

Strict: a key that has no place is an error. Nothing in a file is ever run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from svgpipe.manifests.checkpoint import (
    AUTOENCODER_FILE,
    BACKBONE_FILE,
    OFFICIAL_LATENTS,
    RAW,
    STATISTICS_FILE,
    AutoencoderManifest,
    DiffusionManifest,
    average_name,
    save_tensors,
    weights_file,
)
from svgpipe.manifests.errors import ArtifactError, MismatchError, UsageError
from svgpipe.manifests.filesystem import Location, file_sha256
from svgpipe.manifests.manifest import InputRef, digest, read_json, write_json
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
# The official average takes in the fixed table of positions too, and rounding moves it: 1.7e-4 after 5,000 steps, where
# it stays. What was averaged is kept, as the official sampler uses it.
POSITION_DRIFT = 1e-3
STATISTICS = ("mean", "std")


@dataclass(frozen=True)
class Imported:
    """What came of one file."""

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
    """Convert official files; run again to find what is already there.

    Args:
        autoencoder: Lightning checkpoint of the autoencoder.
        diffusion: checkpoint of the transformer: `ema`, `model` or bare. stats: dinov3_sp_stats.pt, which it needs.
        class_names: of the transformer's labels, in order; without them, their numbers.
    Raises:
        UsageError: a transformer without statistics, or the reverse.
        ArtifactError: files that are missing, unsafe, or hold what has no place.
        MismatchError: `out` holds another import, or the transformer draws latents that are not the autoencoder's.
    """
    if diffusion is None and class_names is not None:
        raise UsageError("--class-names are of the transformer's labels: give --diffusion as well.")
    if (diffusion is None) != (stats is None):
        raise UsageError("--diffusion and --stats belong together: the statistics are what its latents are made with.")
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
                **{k: v for k, v in own.items() if k.startswith("alignment.")},  # not measured yet
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
    # A bare state dict does not say whether it is an average.
    states = {name: tensors_of(path, checkpoint[name]) for name in names} or {
        "model": tensors_of(path, checkpoint, "state_dict")
    }
    try:
        sizes = dit_sizes(next(iter(states.values())))
    except ValueError as error:
        raise ArtifactError(f"{path}: not a diffusion transformer of SVG's: {error}") from error
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
    hint = "" if "ema" in states else "; not known to be an average: sample with --ema raw"
    what = f"DiT {sizes.name}{sigma}, {sizes.num_classes} classes, weights {' and '.join(states)}{hint}"
    aside = _beside(checkpoint, names or ["state_dict"])
    return Imported(out, manifest.fingerprint, what, sum(map(len, states.values())), aside)


def _classes(path: Path, sizes: DiTSizes, given: list[str] | None) -> list[str]:
    """The names given, or numbers. Raises ArtifactError for another number of names than the label table has rows."""
    classes = given if given is not None else [str(label) for label in range(sizes.num_classes)]
    if len(classes) != sizes.num_classes:
        raise ArtifactError(
            f"{path}: its label table has {sizes.num_classes + 1} rows, the last of them for no label; expected "
            f"{sizes.num_classes} class names, found {len(classes)}. (Without label dropout there is no such row; then "
            "the model cannot be guided, and is not imported.)"
        )
    return classes


def _transformer(path: Path, sizes: DiTSizes) -> tuple[DiffusionSection, DiT]:
    """The recipe's section for a transformer of these sizes, and a new one. Raises ArtifactError where none can be."""
    try:
        section = DiTSection.model_validate(sizes, from_attributes=True)
        grid = (sizes.grid, sizes.grid)
        model = build_dit(section, grid=grid, channels=sizes.in_channels, num_classes=sizes.num_classes)
    except ValueError as error:
        raise ArtifactError(f"{path}: sizes that cannot be: {error}") from error
    return DiffusionSection(model=section, ema_decays=(OFFICIAL_EMA,)), model


def _weight_files(path: Path, states: dict[str, dict[str, Tensor]], model: DiT) -> dict[str, dict[str, Tensor]]:
    """Tensors by file name; the official names are ours. Raises ArtifactError for weights that do not fit `model`."""
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
    """What the model is made from. Where a cache would stand: that autoencoder's latents, with those statistics."""
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
    """Raise MismatchError unless the transformer's latents are of the autoencoder's shape."""
    channels = encoder.frozen_channels + encoder.residual_channels
    if (sizes.grid, sizes.grid, sizes.in_channels) != (*encoder.grid, channels):
        raise MismatchError(
            f"{path}: its latents are {sizes.grid}x{sizes.grid}x{sizes.in_channels}, those of the autoencoder "
            f"{'x'.join(map(str, (*encoder.grid, channels)))}. Import the transformer with the autoencoder that it was "
            "trained with."
        )


def _beside(checkpoint: object, used: list[str]) -> dict[str, list[str]]:
    """What a checkpoint holds beside the entries that were used, by the reason why it was left; no keys of weights."""
    if not (isinstance(checkpoint, dict) and any(name in checkpoint for name in used)):
        return {}  # a bare state dict
    others = [str(name) for name in checkpoint if name not in used]
    return {"state of the training, from which none goes on here": others} if others else {}


def _statistics(path: Path, channels: int) -> dict[str, Tensor]:
    """channel_mean and channel_std, (C,). Raises ArtifactError for another number of channels, or a std of 0."""
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
