"""Diffusion models to sample from: finished ones, and checkpoints of runs that are not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svgpipe.manifests.checkpoint import (
    EMA,
    OFFICIAL_LATENTS,
    STATISTICS_FILE,
    CheckpointStore,
    DiffusionManifest,
    choose_weights,
    load_tensors,
    weights_file,
)
from svgpipe.manifests.errors import ArtifactError, UsageError
from svgpipe.manifests.filesystem import Location, absolute
from svgpipe.manifests.manifest import MANIFEST_NAME, PLAN_NAME, Json, read_plan
from svgpipe.manifests.recipe import DiffusionSection, DiTSection
from svgpipe.models.dit import DiT


@dataclass(frozen=True)
class TrainedDiffusion:
    """A finished model, or one checkpoint of a run: where its files lie, and what they are."""

    directory: Location
    config: Json
    step: int
    grid: tuple[int, int]
    channels: int
    class_names: list[str]
    content: dict[str, str]
    cache: str  # fingerprint of the one it was trained on
    made_from: str
    autoencoder: str | None = None  # of an imported model, which knows no cache: fingerprint of whose latents it draws

    def weights_name(self, weights: str = EMA) -> str:
        """Which weights `ema`, `ema-DECAY` or `raw` means here. Raises UsageError where there are no such."""
        name = choose_weights(self.config["ema_decays"], weights)
        if weights_file(name) not in self.content:  # an imported file may hold the average alone
            held = ", ".join(file.removesuffix(".safetensors") for file in self.content if file != STATISTICS_FILE)
            raise UsageError(f"weights {weights!r}: {self.directory} has none; it holds {held}.")
        return name

    def weights_sha256(self, weights: str = EMA) -> str:
        """Of the file that holds them."""
        return self.content[weights_file(self.weights_name(weights))]

    def load(self, weights: str = EMA) -> DiT:
        """The model in eval mode, its file checked.

        Raises:
            ArtifactError: damaged, or weights of other shapes than its config says. UsageError: no such weights.
        """
        config = DiffusionSection.model_validate(self.config)
        model = build_dit(config.model, grid=self.grid, channels=self.channels, num_classes=len(self.class_names))
        file = weights_file(self.weights_name(weights))
        try:
            model.load_state_dict(load_tensors(self.directory / file, self.content[file]))
        except RuntimeError as error:
            raise ArtifactError(f"{self.directory / file}: does not fit its config: {error}") from error
        return model.eval()

    def described(self, weights: str) -> str:
        """For a report: which weights of which step, and their hash."""
        where = f"step {self.step}" if self.step else "an imported file"
        return f"{self.weights_name(weights)} of {where}, {self.weights_sha256(weights)[:12]}"

    def absolute(self) -> TrainedDiffusion:
        """The same for a process with another current directory."""
        return replace(self, directory=absolute(self.directory))

    def statistics(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(C,) channel_mean and channel_std: feature = latent * std + mean."""
        tensors = load_tensors(self.directory / STATISTICS_FILE, self.content[STATISTICS_FILE])
        return tensors["channel_mean"].numpy(), tensors["channel_std"].numpy()


def open_diffusion(source: Location) -> TrainedDiffusion:
    """Find a finished diffusion model, the newest checkpoint of a run, or the checkpoint that is named.

    Raises:
        ArtifactError: none of these lies there.
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
            manifest.content,
            latents.fingerprint,
            f"diffusion {manifest.fingerprint}",
            latents.inputs["autoencoder"].fingerprint if latents.kind == OFFICIAL_LATENTS else None,
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
    )


def build_dit(config: DiTSection, *, grid: tuple[int, int], channels: int, num_classes: int) -> DiT:
    """A new transformer of the recipe's size. Raises ValueError for sizes that do not fit."""
    return DiT(**dit_arguments(config, grid=grid, channels=channels, num_classes=num_classes))


def dit_arguments(config: DiTSection, *, grid: tuple[int, int], channels: int, num_classes: int) -> dict[str, Any]:
    """What `DiT` is constructed with: the recipe's sizes and what the latents ask for."""
    return {"grid": grid, "in_channels": channels, "num_classes": num_classes, **config.model_dump()}
