"""Samples images of given classes from a finished diffusion model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from svgpipe.manifests.errors import ArtifactError, UsageError
from svgpipe.manifests.evaluation_section import EvaluationSection
from svgpipe.manifests.filesystem import Location, location
from svgpipe.manifests.manifest import MANIFEST_NAME
from svgpipe.manifests.model_manifests import EMA, DiffusionManifest, require_decoder
from svgpipe.manifests.recipe_loader import load_recipe
from svgpipe.models.autoencoder import LatentDecoder
from svgpipe.models.dit import DiT
from svgpipe.models.sampler import Watch

from ..images.decode import RGBArray
from ..networks.autoencoder import decode_latents, load_decoder
from ..networks.diffusion import TrainedDiffusion, open_diffusion
from ..networks.guided_model import GuidedModel
from ..networks.sampling import SamplerSettings, keep_as_computed, sample_latents
from ..runtime.device import pick_device
from ..runtime.progress import Progress, Silent
from .classes import class_number

BATCH = 16  # images per forward pass; does not change them
# Keys of the recipe's section evaluation that change a sampling; steps, guidance, seed and weights are arguments.
CHANGEABLE = (
    "solver",
    "time_shift",
    "guidance_mode",
    "guidance_channels",
    "internal_guidance",
    "precision",
    "ddim_eta",
    "sde",
)


class ImageSampler:
    """A finished diffusion model with the decoder of its latents, on the GPU if there is one.

    The n-th image of a class depends only on the models, the settings, the class and n: not on other images that are
    sampled with it. The n-th images of all classes begin with the same noise.
    """

    def __init__(self, model: TrainedDiffusion, decoder: LatentDecoder, weights: str = EMA) -> None:
        """Load the weights `ema`, `ema-DECAY`, `power-SIGMA` or `raw`; see `load` for errors."""
        self.trained, self.weights, self.device = model, model.weights_name(weights), pick_device()
        self.decoder = decoder.to(self.device)
        self.mean, self.std = (torch.from_numpy(values) for values in model.statistics())
        self._loaded: tuple[str, DiT] | None = None

    @property
    def class_names(self) -> list[str]:
        """Names of all classes, in label order."""
        return self.trained.class_names

    def settings(
        self, *overrides: str, steps: int | None = None, guidance: float = 1.0, seed: int = 0
    ) -> SamplerSettings:
        """Return the settings of a sampling: those of samples during the training, changed by the arguments.

        Args:
            *overrides: `evaluation.KEY=VALUE`, as --set has them, with a KEY of `CHANGEABLE`.
            steps: sampling steps; None: as many as for samples during the training.
            guidance: guidance scale; 1: none.
            seed: of the noise.

        Raises:
            UsageError: an unknown key, or a value that is invalid or does not fit the model.
        """
        for override in overrides:
            _require_changeable(override)
        trained = self.trained.section
        own = {
            "steps": trained.sample_steps if steps is None else steps,
            "guidance": guidance,
            "seed": seed,
            "time_shift": trained.sample_shift,
            "solver": "ddim" if trained.objective == "ddpm" else "euler",
            "precision": "auto",
            "weights": self.weights,
        }
        defaults = [f"evaluation.{key}={json.dumps(value)}" for key, value in own.items()]
        config: EvaluationSection = load_recipe(None, [*defaults, *overrides]).evaluation
        return GuidedModel(self.trained).settings(config)[0]

    def sample(
        self,
        labels: Sequence[str | int],
        *,
        steps: int | None = None,
        guidance: float = 1.0,
        seed: int = 0,
        overrides: Sequence[str] = (),
    ) -> RGBArray:
        """Return images (N,H,W,3) uint8, one of every label.

        Args:
            labels: class names, or class numbers from 0. A label that comes n times gives n different images.
            steps: sampling steps; None: as many as for samples during the training.
            guidance: guidance scale; 1: none.
            seed: of the noise.
            overrides: further settings, see `settings`.

        Raises:
            UsageError: an unknown class, or an invalid setting.
            ArtifactError: the model samples latents that are not finite, or its file is damaged.
        """
        numbers = [class_number(label, self.trained) for label in labels]
        return self.images(numbers, self.settings(*overrides, steps=steps, guidance=guidance, seed=seed))

    def images(self, labels: Sequence[int], settings: SamplerSettings, progress: Progress | None = None) -> RGBArray:
        """Return images (N,H,W,3) uint8 of class numbers. Raises the errors of `latents`."""
        shown, places = progress or Silent(), places_of(labels)
        shown.begin("sample", len(labels), "images")
        parts = []
        for first in range(0, len(labels), BATCH):
            chosen = slice(first, first + BATCH)
            parts.append(self.decode(self.latents(labels[chosen], places[chosen], settings)))
            shown.advance(len(parts[-1]))
        return np.concatenate(parts) if parts else np.empty((0, 0, 0, 3), np.uint8)

    def latents(
        self,
        labels: Sequence[int],
        places: Sequence[int],
        settings: SamplerSettings,
        *,
        noise: Tensor | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """Return normalised latents (N,T,C) float32 on the CPU, of images of these labels.

        Args:
            labels: class numbers.
            places: numbers of the images in their classes, which decide the noise.
            settings: of the sampling.
            noise: (N,T,C) to begin with; None: that of `places`.
            watch: receives every state.

        Raises:
            ArtifactError: they are not finite, or the file of the model is damaged.
        """
        given: dict[str, Any] = {"labels": torch.tensor(labels), "noise": noise, "watch": watch}
        latents = sample_latents(self.model(settings), places, settings, self.device, **given).cpu()
        if not latents.isfinite().all():
            raise ArtifactError(
                f"{self.trained.directory}: the model sampled latents that are not finite; train it longer or again."
            )
        return latents

    def decode(self, latents: Tensor) -> RGBArray:
        """Return images (N,H,W,3) uint8 of normalised latents (N,T,C)."""
        cells = (latents * self.std + self.mean).unflatten(1, self.trained.grid)
        return decode_latents(self.decoder, cells)

    def model(self, settings: SamplerSettings) -> DiT:
        """Return the transformer. It is loaded again if the precision changes."""
        if self._loaded is None or self._loaded[0] != settings.precision:
            model = self.trained.load(settings.weights)
            keep_as_computed(model, settings.precision)
            self._loaded = settings.precision, model.to(self.device)
        return self._loaded[1]


def _require_changeable(override: str) -> None:
    """Check the key of an override.

    Raises:
        UsageError: it does not change a sampling.
    """
    section, key, *_ = [*override.partition("=")[0].strip().split("."), ""]
    if section != "evaluation" or key not in CHANGEABLE:
        raise UsageError(
            f"--set {override}: expected evaluation.KEY=VALUE with one of {', '.join(CHANGEABLE)}. Steps, guidance, "
            "seed and weights have options."
        )


def places_of(labels: Sequence[int]) -> list[int]:
    """Return how many equal labels come before each label."""
    before: Counter[int] = Counter()
    places = []
    for label in labels:
        places.append(before[label])
        before[label] += 1
    return places


def load(
    model: str | Path | Location, autoencoder: str | Path | Location | None = None, weights: str = EMA
) -> ImageSampler:
    """Open a finished diffusion model, or a checkpoint of one, and the decoder of its latents.

    Args:
        model: directory of the diffusion model.
        autoencoder: directory of the autoencoder; None: the one that the manifests name.
        weights: `ema`, `ema-DECAY`, `power-SIGMA` or `raw`.

    Returns:
        The sampler.

    Raises:
        ArtifactError: something is missing, unfinished or damaged.
        MismatchError: the autoencoder has other latents.
        UsageError: no such weights, or nothing names the autoencoder.
    """
    trained, found = open_model(model, autoencoder)
    return ImageSampler(trained, load_decoder(found)[0], weights)


def open_model(
    model: str | Path | Location, autoencoder: str | Path | Location | None
) -> tuple[TrainedDiffusion, Location]:
    """Open a diffusion model, and find the autoencoder of its latents.

    Returns:
        The model, and the directory of the autoencoder.

    Raises:
        ArtifactError: see `load`, as for the others.
        MismatchError: see there.
        UsageError: see there.
    """
    place = _as_location(model)
    trained = open_diffusion(place)
    # A checkpoint names no autoencoder. Of a given one, only the shape of its latents can be compared.
    cache = DiffusionManifest.read(place).inputs["cache"] if (place / MANIFEST_NAME).exists() else None
    maker = None if cache is None else cache.inputs.get("autoencoder")
    give = "Give the autoencoder of its cache with --autoencoder."
    if autoencoder is not None:
        found = _as_location(autoencoder)
    elif cache is None or maker is None:
        raise UsageError(f"{place}: does not say where its autoencoder is. {give}")
    else:
        found = maker.place(cache.place(place))
        if not found.exists():
            raise UsageError(f"{place}: its autoencoder is not at {found} any more. {give}")
    require_decoder(str(place), maker, (*trained.grid, trained.channels), found, give)
    return trained, found


def _as_location(path: str | Path | Location) -> Location:
    return location(str(path)) if isinstance(path, str | Path) else path
