"""`svgpipe ema`: averages of the weights of any length, from the snapshots of a finished training (EDM2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from svgpipe.manifests.cache import FeatureCache
from svgpipe.manifests.checkpoint import load_tensors, save_tensors
from svgpipe.manifests.errors import MismatchError, UsageError
from svgpipe.manifests.filesystem import Location, children
from svgpipe.manifests.lock import locked
from svgpipe.manifests.model_manifests import (
    POWER,
    RAW,
    DiffusionManifest,
    average_name,
    power_name,
    weights_file,
)
from svgpipe.manifests.power_averages import MadeAverages, read_snapshot_name, snapshot_file
from svgpipe.models.ema import Snapshot, combine_snapshots

from ..networks.diffusion import open_diffusion
from ..runtime.device import pick_device
from ..runtime.progress import Progress, Silent
from ..train_diffusion.latent_quality import LatentQuality
from ..training.distributed import ProcessGroup


@dataclass(frozen=True)
class Average:
    """One average of the weights.

    Attributes:
        name: `power-SIGMA`, `ema-DECAY` or `raw`.
        error: relative L2 distance of the combined profile to the wanted one; None: not combined.
        rounding: relative error of a weight from the float16 of the snapshots; None: not combined.
        latent_fd: Fréchet distance of samples to held-out rows in latent space; None: not measured.
        latent_accuracy: fraction of samples that are nearest to the mean of their class; None: not measured.
    """

    name: str
    error: float | None = None
    rounding: float | None = None
    latent_fd: float | None = None
    latent_accuracy: float | None = None


def reconstruct_averages(
    model: Location, sigmas: Sequence[float], *, evaluate: FeatureCache | None = None, progress: Progress | None = None
) -> list[Average]:
    """Write `power-SIGMA.safetensors` next to the weights of a finished model, for every sigma.

    The result depends on the snapshots and on sigma only. The manifest of the model does not change.

    Args:
        model: finished diffusion model that was trained with `diffusion.power_averages`.
        sigmas: lengths relative to the training, 0.005 to 0.28.
        evaluate: cache of the model; if given, all averages are measured, see `_measured`.
        progress: receives the progress.

    Returns:
        The averages, with the error of each profile.

    Raises:
        UsageError: the model has no snapshots, a length that is not possible, or nothing to measure.
        MismatchError: the model was not trained on the cache.
        ArtifactError: no finished model, or a damaged snapshot.
    """
    manifest, progress = DiffusionManifest.read(model), progress or Silent()
    if evaluate is not None:
        _require_measurable(model, evaluate)
    names = [found for name in manifest.content if (found := read_snapshot_name(name)) is not None]
    if not names:
        raise UsageError(
            f"{model}: has no snapshots of power averages. Train with diffusion.power_averages, for example "
            "{sigmas: [0.05, 0.10], every: 5000}."
        )
    snapshots = [Snapshot(sigma, step) for step, sigma in sorted(names)]
    try:
        combinations = [combine_snapshots(snapshots, Snapshot(sigma, manifest.steps)) for sigma in sigmas]
    except ValueError as error:
        raise UsageError(f"--sigma: {error}.") from error
    factors = torch.tensor([combination.factors.tolist() for combination in combinations])
    averages = _combined(model, manifest, snapshots, factors, progress)
    with locked(model):
        kept = dict(MadeAverages.read(model, manifest.fingerprint).content)
        for path in children(model):
            if path.name.startswith(f"{POWER}-") and path.name not in kept:  # of an earlier, shorter training
                path.unlink()
        for sigma, tensors in zip(sigmas, averages, strict=True):
            file = weights_file(power_name(sigma))
            kept[file] = save_tensors(model / file, tensors)
        MadeAverages(model=manifest.fingerprint, content=kept).write(model)
    made = [
        Average(power_name(sigma), found.error, found.rounding)
        for sigma, found in zip(sigmas, combinations, strict=True)
    ]
    return made if evaluate is None else _measured(model, made, evaluate, progress)


def _combined(
    model: Location, manifest: DiffusionManifest, snapshots: list[Snapshot], factors: Tensor, progress: Progress
) -> list[dict[str, Tensor]]:
    """Return float32 sums of snapshots times factors (average, snapshot); constants as in the raw weights."""
    raw = load_tensors(model / weights_file(RAW), manifest.content[weights_file(RAW)])
    parameters = _parameters(model, raw)
    sums = [{name: torch.zeros_like(raw[name]) for name in parameters} for _ in factors]
    progress.begin("combine", len(snapshots), "snapshots")
    for number, snapshot in enumerate(snapshots):
        file = snapshot_file(snapshot.step, snapshot.sigma)
        halves = load_tensors(model / file, manifest.content[file])
        for total, factor in zip(sums, factors[:, number].tolist(), strict=True):
            for name, value in total.items():
                value.add_(halves[name].float(), alpha=factor)
        progress.advance()
    return [raw | total for total in sums]


def _parameters(model: Location, raw: dict[str, Tensor]) -> list[str]:
    """Return the names of the averaged tensors; the others are constants, such as tables of positions."""
    trained = open_diffusion(model).load(RAW)
    return [name for name, _ in trained.named_parameters() if name in raw]


def _require_measurable(model: Location, cache: FeatureCache) -> None:
    """Check that samples of a model can be measured in the latent space of a cache.

    Raises:
        MismatchError: another cache.
        UsageError: the recipe has no samples to measure.
    """
    trained = open_diffusion(model)
    if trained.cache != cache.manifest.fingerprint:
        raise MismatchError(
            f"{cache.path}: has the fingerprint {cache.manifest.fingerprint}, but {model} was trained on "
            f"{trained.cache}. Give the cache that it was trained on."
        )
    if not trained.section.quality_samples:
        raise UsageError(f"--evaluate: {model} was trained with diffusion.quality_samples=0, so nothing is sampled.")


def _measured(model: Location, averages: Sequence[Average], cache: FeatureCache, progress: Progress) -> list[Average]:
    """Measure samples in latent space, as during training.

    Returns:
        The model's own weights, then `averages`, all measured.
    """
    trained = open_diffusion(model)
    config, group = trained.section, ProcessGroup(pick_device())
    quality = LatentQuality(cache, config, group, progress.say)
    own = [Average(name) for name in (*map(average_name, config.ema_decays), RAW)]
    measured = []
    progress.begin("sample", len(own) + len(averages), "averages")
    for average in (*own, *averages):
        found = quality.measure(trained.load(average.name).to(group.device))
        distance, accuracy = found.get("latent_fd"), found.get("latent_accuracy")
        measured.append(replace(average, latent_fd=distance, latent_accuracy=accuracy))
        progress.advance(1, average.name)
    return measured
