"""`svgpipe ema`: averages of the weights of any length, from the snapshots of a finished training (EDM2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svgpipe.manifests.cache import FeatureCache
from svgpipe.manifests.checkpoint import load_tensors, save_tensors
from svgpipe.manifests.errors import MismatchError, UsageError
from svgpipe.manifests.filesystem import Location
from svgpipe.manifests.lock import locked
from svgpipe.manifests.model_manifests import (
    RAW,
    DiffusionManifest,
    average_name,
    power_name,
    weights_file,
)
from svgpipe.manifests.power_averages import Reconstructed, read_snapshot_name, snapshot_file
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
        latent_fd: Fréchet distance of samples to held-out rows in latent space; None: not measured.
        latent_accuracy: fraction of samples that are nearest to the mean of their class; None: not measured.
    """

    name: str
    error: float | None = None
    latent_fd: float | None = None
    latent_accuracy: float | None = None


def reconstruct_averages(
    model: Location, sigmas: Sequence[float], *, progress: Progress | None = None
) -> list[Average]:
    """Write `power-SIGMA.safetensors` next to the weights of a finished model, for every sigma.

    The result depends on the snapshots and on sigma only. The manifest of the model does not change.

    Args:
        model: finished diffusion model that was trained with `diffusion.power_averages`.
        sigmas: lengths relative to the training, 0 to 0.28.
        progress: receives the progress.

    Returns:
        The averages, with the error of each profile.

    Raises:
        UsageError: the model has no snapshots, or a length that is not possible.
        ArtifactError: no finished model, or a damaged snapshot.
    """
    manifest, progress = DiffusionManifest.read(model), progress or Silent()
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
        kept = dict(Reconstructed.read(model, manifest.fingerprint).content)
        for sigma, tensors in zip(sigmas, averages, strict=True):
            file = weights_file(power_name(sigma))
            kept[file] = save_tensors(model / file, tensors)
        Reconstructed(model=manifest.fingerprint, content=kept).write(model)
    return [Average(power_name(sigma), found.error) for sigma, found in zip(sigmas, combinations, strict=True)]


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


def measure_averages(
    model: Location, averages: Sequence[Average], cache: FeatureCache, *, progress: Progress | None = None
) -> list[Average]:
    """Measure samples of averages in latent space, as during training; also of the model's other weights.

    Args:
        model: finished diffusion model.
        averages: reconstructed for it.
        cache: that it was trained on.
        progress: receives the progress.

    Returns:
        The measured averages: those of the training first.

    Raises:
        MismatchError: another cache.
        UsageError: the recipe has no samples to measure.
    """
    progress, trained = progress or Silent(), open_diffusion(model)
    if trained.cache != cache.manifest.fingerprint:
        raise MismatchError(
            f"{cache.path}: has the fingerprint {cache.manifest.fingerprint}, but {model} was trained on "
            f"{trained.cache}. Give the cache that it was trained on."
        )
    config = trained.section
    if not config.quality_samples:
        raise UsageError(f"--evaluate: {model} was trained with diffusion.quality_samples=0, so nothing is sampled.")
    group = ProcessGroup(pick_device())
    quality = LatentQuality(cache, config, group, progress.say)
    names = [*map(average_name, config.ema_decays), RAW, *(average.name for average in averages)]
    errors = {average.name: average.error for average in averages}
    measured = []
    progress.begin("sample", len(names), "averages")
    for name in names:
        found = quality.measure(trained.load(name).to(group.device))
        values = {key: found.get(key) for key in ("latent_fd", "latent_accuracy")}
        measured.append(Average(name, errors.get(name), **values))
        progress.advance(1, name)
    return measured
