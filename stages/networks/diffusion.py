"""Diffusion models for sampling: finished models, and checkpoints of unfinished runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svgpipe.manifests.checkpoint import CheckpointStore, load_tensors
from svgpipe.manifests.diffusion_section import DiffusionSection, DiTSection, Objective
from svgpipe.manifests.errors import ArtifactError, UsageError
from svgpipe.manifests.filesystem import Location, absolute
from svgpipe.manifests.manifest import MANIFEST_NAME, PLAN_NAME, Json, read_plan
from svgpipe.manifests.model_manifests import (
    EMA,
    OFFICIAL_LATENTS,
    POWER,
    STATISTICS_FILE,
    DiffusionManifest,
    choose_weights,
    weights_file,
)
from svgpipe.manifests.power_averages import MadeAverages, read_snapshot_name
from svgpipe.models.dit import DiT


@dataclass(frozen=True)
class TrainedDiffusion:
    """A finished model, or one checkpoint of a run: location and description of its files."""

    directory: Location
    config: Json
    step: int
    grid: tuple[int, int]
    channels: int
    class_names: list[str]
    content: dict[str, str]
    cache: str  # fingerprint of the cache it was trained on
    made_from: str
    autoencoder: str | None = None  # imported model, which has no cache: fingerprint of the autoencoder of its latents
    untrained_classes: tuple[int, ...] = ()

    @property
    def cells(self) -> int:
        """Number of cells of the grid of latents."""
        return self.grid[0] * self.grid[1]

    @property
    def section(self) -> DiffusionSection:
        """Section `diffusion` of the recipe it was trained with."""
        return DiffusionSection.model_validate(self.config)

    @property
    def objective(self) -> Objective:
        """What the model was trained to predict."""
        return self.section.objective

    @property
    def classes(self) -> tuple[int, ...] | None:
        """Class indexes that the model was trained on; None: all."""
        return trained_classes(len(self.class_names), self.untrained_classes)

    def weights_name(self, weights: str = EMA) -> str:
        """Return the name of the weights `ema`, `ema-DECAY` or `raw` of this model.

        Raises:
            UsageError: it has no such weights.
        """
        name = choose_weights(self.config["ema_decays"], weights)
        if weights_file(name) not in self.content:  # an imported file may hold EMA weights only
            files = [file for file in self.content if file != STATISTICS_FILE and read_snapshot_name(file) is None]
            held = ", ".join(file.removesuffix(".safetensors") for file in files)
            can_make = name.startswith(POWER) and any(map(read_snapshot_name, self.content))
            make = f" svgpipe ema {self.directory} makes power averages." if can_make else ""
            raise UsageError(
                f"weights {weights!r}: {self.directory} has none; it holds {held}. Choose with --ema, or with "
                f"evaluation.weights in a recipe.{make}"
            )
        return name

    def weights_sha256(self, weights: str = EMA) -> str:
        """Return the sha256 of the file of these weights."""
        return self.content[weights_file(self.weights_name(weights))]

    def load(self, weights: str = EMA) -> DiT:
        """Return the model in eval mode. The file is checked.

        Raises:
            ArtifactError: the file is damaged or does not fit the config.
            UsageError: no such weights.
        """
        model = build_dit(self.section, grid=self.grid, channels=self.channels, num_classes=len(self.class_names))
        file = weights_file(self.weights_name(weights))
        try:
            model.load_state_dict(load_tensors(self.directory / file, self.content[file]))
        except RuntimeError as error:
            raise ArtifactError(f"{self.directory / file}: does not fit its config: {error}") from error
        return model.eval()

    def described(self, weights: str) -> str:
        """Return a description for a report: weights, step and hash."""
        where = f"step {self.step}" if self.step else "an imported file"
        return f"{self.weights_name(weights)} of {where}, {self.weights_sha256(weights)[:12]}"

    def absolute(self) -> TrainedDiffusion:
        """Return the same with absolute paths, for processes with another current directory."""
        return replace(self, directory=absolute(self.directory))

    def statistics(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return (C,) channel_mean and channel_std: feature = latent * std + mean."""
        tensors = load_tensors(self.directory / STATISTICS_FILE, self.content[STATISTICS_FILE])
        return tensors["channel_mean"].numpy(), tensors["channel_std"].numpy()


def open_diffusion(source: Location) -> TrainedDiffusion:
    """Return a finished diffusion model, the newest checkpoint of a run, or a given checkpoint.

    Raises:
        ArtifactError: there is none of these.
    """
    if (source / MANIFEST_NAME).exists():
        manifest = DiffusionManifest.read(source)
        latents = manifest.inputs["cache"]
        return TrainedDiffusion(
            source,
            manifest.config,
            manifest.steps,
            manifest.grid,
            manifest.channels,
            manifest.class_names,
            manifest.content | MadeAverages.read(source, manifest.fingerprint).content,
            latents.fingerprint,
            f"diffusion {manifest.fingerprint}",
            latents.inputs["autoencoder"].fingerprint if latents.kind == OFFICIAL_LATENTS else None,
            tuple(manifest.untrained_classes),
        )
    run, wanted = (source.parent.parent, source.name) if source.parent.name == "checkpoints" else (source, None)
    entry = CheckpointStore(run / "checkpoints").entry(wanted)
    if entry is None or not (run / PLAN_NAME).exists() or "class_names" not in entry["values"]:
        raise ArtifactError(f"{source}: expected a diffusion model or a checkpoint of one, found neither.")
    plan, values = read_plan(run), entry["values"]
    rows, columns = values["grid"]
    return TrainedDiffusion(
        run / "checkpoints" / entry["folder"],
        plan["config"],
        int(entry["step"]),
        (rows, columns),
        int(values["channels"]),
        list(values["class_names"]),
        {weights_file(group): sha256 for group, sha256 in entry["files"].items()},
        plan["inputs"]["cache"],
        f"step {entry['step']} of a run on cache {plan['inputs']['cache']}",
        untrained_classes=tuple(values.get("untrained_classes", ())),
    )


def trained_classes(num_classes: int, untrained: Sequence[int]) -> tuple[int, ...] | None:
    """Return the class indexes that may be sampled; None if these are all."""
    without = set(untrained)
    return tuple(c for c in range(num_classes) if c not in without) if without else None


def build_dit(config: DiffusionSection, *, grid: tuple[int, int], channels: int, num_classes: int) -> DiT:
    """Return a new transformer of the recipe's size. Raises the errors of `DiT`."""
    return DiT(**dit_arguments(config, grid=grid, channels=channels, num_classes=num_classes))


def require_patches(config: DiTSection, grid: tuple[int, int], where: str) -> None:
    """Check that the patches of a recipe divide the grid of latents `where`.

    Raises:
        UsageError: they do not.
    """
    if any(side % (config.patch_size or 1) for side in grid):
        raise UsageError(
            f"diffusion.model.patch_size: expected a divisor of the grid of {where}, {grid[0]}x{grid[1]}, found "
            f"{config.patch_size}."
        )


def width_warning(config: DiTSection, channels: int) -> str | None:
    """Return a warning if the transformer is narrower than its tokens, or None. Source: arXiv 2510.11690 (RAE), 4.1.

    With a wide head, it is the head's width that counts.
    """
    values = channels * (config.patch_size or 1) ** 2
    key, width = "width", config.width
    if config.wide_head is not None:
        key, width = "wide_head.width", config.wide_head.width
    if width >= values:
        return None
    return (
        f"warning: diffusion.model.{key} {width} is below the {values} values of a token. Such a model cannot fit even "
        f"one image, because a token does not fit through its width. Use a width of at least {values}"
        f"{'' if config.wide_head else ', or a diffusion.model.wide_head of that width'}."
    )


def dit_arguments(
    config: DiffusionSection, *, grid: tuple[int, int], channels: int, num_classes: int
) -> dict[str, Any]:
    """Return the constructor arguments of `DiT` for a recipe and the shape of the latents."""
    shape = {"grid": grid, "in_channels": channels, "num_classes": num_classes}
    variance = {"returns_variance": True} if config.objective == "ddpm" else {}
    data = {"predict_data": True} if config.predict_data else {}
    return {**shape, **config.model.model_dump(), **variance, **data}
