"""Latents of every setting of a sweep, stored where sweeps share them.

    POOL/steps-025_guidance-1.5_0123abcd4567/    one Zarr group per setting and model, in the format of the cache
        journal/                                 one record per outer shard, with its hash

The name ends in a digest of everything that determines a latent: weights, sampler, seed, guide. Sweeps with the same
weights, sampler, seed and guide share latents, also with other numbers of samples. The first sweep fixes the size of
the outer shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.evaluation_section import EvaluationSection
from svgpipe.manifests.feature_store import FeatureStore
from svgpipe.manifests.filesystem import Location, absolute, make_directory
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.lock import Lock
from svgpipe.manifests.manifest import digest
from svgpipe.manifests.store_spec import StoreSpec

from ..networks.diffusion import TrainedDiffusion
from ..networks.guided_model import GuidedModel
from ..networks.sampling import SamplerSettings, keep_as_computed, sample_latents
from ..runtime.device import is_compiled, warn_if_imitated
from ..runtime.progress import Progress
from ..runtime.runner import Runner, Steps
from .cpu_tasks import LatentsUnit, SampledUnit, WriteLatents, pass_on

DESCRIPTION = "sampler"


@dataclass(frozen=True)
class SampledLatents:
    """The first `count` latents of a store, which may hold more."""

    setting: SamplerSettings
    store: FeatureStore
    hashes: list[str]  # of their outer shards


@dataclass(frozen=True)
class _Store:
    """Latents of one setting: store, journal, and number of outer shards that the sweep needs."""

    setting: SamplerSettings
    store: FeatureStore
    journal: Journal
    count: int

    def sampled(self) -> SampledLatents:
        """Return all latents of the sweep, after they were sampled."""
        files = [file for unit in range(self.count) for file in self.journal.files(unit)]
        return SampledLatents(self.setting, self.store, [file.sha256 for file in files])


@dataclass(frozen=True)
class Sweep:
    """What is sampled.

    Attributes:
        sampler: the model, and its guide.
        settings: of the sweep.
        config: number of samples, and sizes of units and batches.
        pool: holds `latents`.
    """

    sampler: GuidedModel
    settings: tuple[SamplerSettings, ...]
    config: EvaluationSection
    pool: Location


def sample_sweep(sweep: Sweep, runner: Runner, progress: Progress) -> list[SampledLatents]:
    """Sample the missing latents of every setting.

    Returns:
        The latents of every setting.

    Raises:
        BusyError: another process samples the same latents.
        ArtifactError: latents are not finite.
    """
    with ExitStack() as locks:
        stores = [_open(sweep, setting, locks) for setting in sweep.settings]
        missing = [
            LatentsUnit(number, unit)
            for number, store in enumerate(stores)
            for unit in store.journal.missing(range(store.count))
        ]
        if missing and runner.computes_on_cpu:
            warn_if_imitated(sweep.config.precision)  # here, because logs of workers are not shown
        specs = [store.store.spec for store in stores]
        total = sum(store.count * store.store.spec.unit_rows for store in stores)
        progress.begin("sample", total, "latents", total - sum(specs[unit.setting].unit_rows for unit in missing))
        steps = Steps(
            pass_on,
            partial(
                _SampleUnit, sampler=sweep.sampler.absolute(), settings=sweep.settings, config=sweep.config, specs=specs
            ),
            WriteLatents([absolute(store.store.path) for store in stores], specs),
        )
        for sampled in runner.run(missing, steps):
            progress.advance(specs[sampled.setting].unit_rows)
        return [store.sampled() for store in stores]


def _open(sweep: Sweep, setting: SamplerSettings, locks: ExitStack) -> _Store:
    """Lock and prepare the store of one setting.

    Returns:
        The store.
    """
    config = sweep.config
    path = sweep.pool / "latents" / f"{setting.name}_{_key(sweep.sampler, setting, config)}"
    make_directory(path)
    locks.callback(Lock(path).release)
    store = _prepare(path, sweep.sampler.model, setting, config.num_samples, config.unit_rows)
    # Whole outer shards, so that another sweep that adds samples does not change existing ones.
    return _Store(setting, store, Journal(path), -(-config.num_samples // store.spec.unit_rows))


def _key(sampler: GuidedModel, setting: SamplerSettings, config: EvaluationSection) -> str:
    return digest([sampler.model.weights_sha256(config.weights), setting.identity])[:12]


def _prepare(
    path: Location, model: TrainedDiffusion, setting: SamplerSettings, count: int, unit_rows: int
) -> FeatureStore:
    """Return the store with room for `count` latents. Existing units keep their size and content.

    The description attribute is written last. A store without it was interrupted: its metadata is written again, and
    existing shards are kept.
    """
    journal = Journal(path)
    if (first := next(filter(None, map(journal.find, journal.numbers())), None)) is not None:
        unit_rows = first.entry["rows"]
    rows = -(-count // unit_rows) * unit_rows
    store = _whole_store(path)
    if store is not None and store.spec.unit_rows == unit_rows and store.spec.num_samples >= rows:
        return store
    spec = StoreSpec(rows, ("original",), model.grid, model.channels, unit_rows, tuple(model.class_names))
    store = FeatureStore.create(path, spec, *model.statistics())
    labels = setting.labels_of(range(rows), len(model.class_names))
    store.put("label", labels.numpy().astype(np.int32), "sample")
    store.put("valid", np.ones(rows, bool), "sample")
    store.describe({DESCRIPTION: setting.identity, "model": model.made_from})
    return store


def _whole_store(path: Location) -> FeatureStore | None:
    try:
        store = FeatureStore.open(path)
    except ArtifactError:
        return None
    return store if DESCRIPTION in store.group.attrs else None


class _SampleUnit:
    """Samples a unit of latents of one setting."""

    def __init__(
        self,
        device: torch.device,
        *,
        sampler: GuidedModel,
        settings: Sequence[SamplerSettings],
        config: EvaluationSection,
        specs: Sequence[StoreSpec],
    ) -> None:
        self.device, self.settings, self.config, self.specs = device, settings, config, specs
        models = [sampler.model.load(config.weights)]
        if sampler.guide is not None:
            models.append(sampler.guide.load(config.guide_weights))
        for model in models:
            keep_as_computed(model, config.precision)
        self.models = [model.to(device) for model in models]
        if is_compiled(config.compile, device):
            for model in self.models:
                model.compile()

    def __call__(self, wanted: LatentsUnit) -> SampledUnit:
        setting, spec = self.settings[wanted.setting], self.specs[wanted.setting]
        start, size = wanted.unit * spec.unit_rows, self.config.batch_size
        indices = range(start, start + spec.unit_rows)
        parts = [
            sample_latents(self.models[0], indices[i : i + size], setting, self.device, *self.models[1:]).cpu()
            for i in range(0, len(indices), size)
        ]
        latents = torch.cat(parts).numpy().astype(np.float16)
        if not np.isfinite(latents).all():
            raise ArtifactError(
                f"{setting.name}: the model sampled latents that are not finite; train it longer or again."
            )
        shape = (len(indices), 1, *spec.grid, spec.channels)
        return SampledUnit(wanted.setting, wanted.unit, latents.reshape(shape))
