"""Latents drawn on Ray workers, kept where several sweeps find them.

    POOL/steps-025_guidance-1.5_0123abcd4567/    one Zarr group in the cache's own format for each setting and model
        journal/                                 one record per outer shard, with its hash

The name ends in a digest of all that decides a latent: weights, sampler, seed, the guide. So sweeps that agree in these
share latents, however many samples each of them asks for, and whatever the units in which it would draw them: a store
keeps the units of the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from svgpipe.manifests.errors import ArtifactError, MismatchError, UsageError
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.lock import Lock
from svgpipe.manifests.manifest import InputRef, digest
from svgpipe.manifests.recipe import EvaluationSection
from svgpipe.manifests.storage import Location, absolute, file_size, make_directory
from svgpipe.manifests.store import FeatureStore
from svgpipe.manifests.store_spec import StoreSpec
from svgpipe.models.sampler import Guidance

from ..networks.diffusion import TrainedDiffusion
from ..networks.sampling import SamplerSettings, draw_latents, keep_as_computed, labels_of
from ..runtime.device import is_compiled, warn_if_imitated
from ..runtime.progress import Progress
from ..runtime.runner import Resources, Row, run_units, start_worker
from .cpu_tasks import LatentsRecord, WriteLatents, pass_on

DESCRIPTION = "sampler"


@dataclass(frozen=True)
class DrawnLatents:
    """The first `count` latents of a store that may hold more."""

    setting: SamplerSettings
    store: FeatureStore
    hashes: list[str]  # of the outer shards that they lie in

    def content(self, first: int, end: int) -> str:
        """Digest of the outer shards that hold the latents from `first` on, up to `end`."""
        rows = self.store.spec.unit_rows
        return digest(self.hashes[first // rows : -(-end // rows)])


@dataclass(frozen=True)
class Sampler:
    """The model that draws, and the worse one that guides it, if there is one."""

    model: TrainedDiffusion
    guide: TrainedDiffusion | None = None

    def settings(self, config: EvaluationSection) -> list[SamplerSettings]:
        """Every point of the sweep.

        Raises:
            UsageError: a guidance mode that does not exist, or that has no meaning with a guide.
        """
        try:
            guidance = Guidance(1.0, config.guidance_mode)
        except ValueError as error:
            raise UsageError(f"evaluation.guidance_mode: {error}") from error
        if self.guide is not None and guidance.kind == "cfg_star":
            raise UsageError("evaluation.guidance_mode: cfg_star is about unconditional velocities; a guide has none.")
        return [
            SamplerSettings(
                steps=steps,
                guidance=scale,
                solver=config.solver,
                guidance_mode=config.guidance_mode,
                time_shift=config.time_shift,
                seed=config.seed,
                precision=config.precision,
                weights=self.model.weights_name(config.weights),
                labels=config.labels,
                guide=None if self.guide is None else self.guide.described(config.guide_weights),
            )
            for scale in config.guidance
            for steps in config.steps
        ]

    def require_match(self) -> None:
        """Raise MismatchError unless both models draw latents of the same kind."""
        if self.guide is None:
            return
        ours, theirs = self.model, self.guide
        same_shape = (ours.grid, ours.channels, ours.class_names) == (theirs.grid, theirs.channels, theirs.class_names)
        pairs = zip(ours.statistics(), theirs.statistics(), strict=True)
        if not same_shape or not all(np.array_equal(a, b) for a, b in pairs):
            raise MismatchError(
                f"--guide {theirs.directory}: expected a model of the same latents as {ours.directory}, found one of "
                f"another {'cache' if same_shape else 'shape or other classes'}. Train both on one cache."
            )

    def guide_input(self, config: EvaluationSection) -> dict[str, InputRef]:
        """What the guide adds to an evaluation's inputs."""
        guide = self.guide
        if guide is None:
            return {}
        about = {"weights": guide.weights_name(config.guide_weights), "step": guide.step, "made_from": guide.made_from}
        sha256 = guide.weights_sha256(config.guide_weights)
        return {"guide": InputRef(kind="diffusion", fingerprint=sha256, path=str(guide.directory), config=about)}


def draw(
    sampler: Sampler,
    settings: Sequence[SamplerSettings],
    config: EvaluationSection,
    pool: Location,
    *,
    resources: Resources,
    progress: Progress,
) -> list[DrawnLatents]:
    """Draw what `pool` does not hold yet of `config.num_samples` latents for each of `settings`. Ray must be connected.

    Raises:
        BusyError: another process draws the same latents now. ArtifactError: latents that are not finite.
    """
    if not resources.gpus_per_worker:
        warn_if_imitated(config.precision)  # here, since nobody reads what a worker logs
    with ExitStack() as locks:
        stores = []
        for setting in settings:
            path = pool / f"{setting.name}_{_key(sampler, setting, config)}"
            make_directory(path)
            locks.callback(Lock(path).release)
            stores.append(_prepare(path, sampler.model, setting, config.num_samples, config.unit_rows))
        specs, journals = [store.spec for store in stores], [Journal(store.path / "journal") for store in stores]
        # Whole outer shards: what another sweep adds must not change what is there.
        counts = [-(-config.num_samples // spec.unit_rows) for spec in specs]
        units = [(number, unit) for number, count in enumerate(counts) for unit in range(count)]
        there = [_drawn(store, journal) for store, journal in zip(stores, journals, strict=True)]
        missing = [
            {"unit": place, "setting": number, "number": unit}
            for place, (number, unit) in enumerate(units)
            if unit not in there[number]
        ]
        progress.begin("sample", len(units), len(units) - len(missing))
        args: dict[str, Any] = {
            "sampler": _absolute(sampler),
            "settings": settings,
            "config": config,
            "specs": specs,
            "threads": resources.threads,
        }
        writer = WriteLatents([absolute(store.path) for store in stores], specs)
        in_all = sum(specs[number].unit_rows for number, _ in units)
        for _ in run_units(missing, pass_on, _Draw, args, writer, resources):
            progress.advance(1, f"{in_all} latents in all")
        hashes = [
            [records[unit].sha256 for unit in range(count)]
            for count, records in zip(counts, map(_records, journals), strict=True)
        ]
    return [DrawnLatents(*drawn) for drawn in zip(settings, stores, hashes, strict=True)]


def _key(sampler: Sampler, setting: SamplerSettings, config: EvaluationSection) -> str:
    return digest([sampler.model.weights_sha256(config.weights), asdict(setting.deciding)])[:12]


def _prepare(
    path: Location, model: TrainedDiffusion, setting: SamplerSettings, count: int, unit_rows: int
) -> FeatureStore:
    """The store with room for `count` latents, in units as large as those that are drawn already; these stay.

    Its description is written last, so a store that has one is whole; another was left by a kill and is made anew
    around the shards that lie there.
    """
    if records := _records(Journal(path / "journal")):
        unit_rows = records[min(records)].rows
    rows = -(-count // unit_rows) * unit_rows
    store = _whole_store(path)
    if store is not None and store.spec.unit_rows == unit_rows and store.spec.num_samples >= rows:
        return store
    spec = StoreSpec(rows, ("original",), model.grid, model.channels, unit_rows, tuple(model.class_names))
    store = FeatureStore.create(path, spec, *model.statistics())
    labels = labels_of(range(rows), len(model.class_names), setting)
    store.put("label", labels.numpy().astype(np.int32), "sample")
    store.put("valid", np.ones(rows, bool), "sample")
    store.describe({DESCRIPTION: asdict(setting.deciding), "model": model.made_from})
    return store


def _whole_store(path: Location) -> FeatureStore | None:
    try:
        store = FeatureStore.open(path)
    except ArtifactError:
        return None
    return store if DESCRIPTION in store.group.attrs else None


def _records(journal: Journal) -> dict[int, LatentsRecord]:
    """Of every unit that has one which can be read."""
    found = {}
    for unit in journal.finished():
        with suppress(ArtifactError, ValidationError):
            found[unit] = LatentsRecord.model_validate(journal.read(unit))
    return found


def _drawn(store: FeatureStore, journal: Journal) -> set[int]:
    """Units with a record whose file is of the size that was recorded."""
    records = _records(journal)
    return {unit for unit, record in records.items() if file_size(store.unit_file(unit)) == record.num_bytes}


def _absolute(sampler: Sampler) -> Sampler:
    return Sampler(sampler.model.absolute(), None if sampler.guide is None else sampler.guide.absolute())


class _Draw:
    """Actor: a unit of one setting's latents."""

    def __init__(
        self,
        sampler: Sampler,
        settings: Sequence[SamplerSettings],
        config: EvaluationSection,
        specs: Sequence[StoreSpec],
        threads: int,
    ) -> None:
        self.device = start_worker(threads)
        self.settings, self.config, self.specs = settings, config, specs
        models = [sampler.model.load(config.weights)]
        if sampler.guide is not None:
            models.append(sampler.guide.load(config.guide_weights))
        for model in models:
            keep_as_computed(model, config.precision)
        self.models = [model.to(self.device) for model in models]
        if is_compiled(config.compile, self.device):
            for model in self.models:
                model.compile()

    def __call__(self, row: Row) -> Row:
        setting, spec = self.settings[row["setting"]], self.specs[row["setting"]]
        start, size = int(row["number"]) * spec.unit_rows, self.config.batch_size
        indices = range(start, start + spec.unit_rows)
        parts = [
            draw_latents(self.models[0], indices[i : i + size], setting, self.device, *self.models[1:]).cpu()
            for i in range(0, len(indices), size)
        ]
        latents = torch.cat(parts).numpy().astype(np.float16)
        if not np.isfinite(latents).all():
            raise ArtifactError(f"{setting.name}: the model drew latents that are not finite; train longer or anew.")
        shape = (len(indices), 1, *spec.grid, spec.channels)
        return {**row, "latents": latents.reshape(shape)}
