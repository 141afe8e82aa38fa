"""`svgpipe extract`: shard set to normalised feature cache.

    read + decode (CPU threads) → encode (device) → write (CPU threads)

The unit of work is one outer Zarr shard. A calibration pass over an evenly spread subset fixes the channel statistics
before the first unit. One writer writes a whole unit, followed by its journal record. An interrupted run computes the
missing units and ends with the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from svgpipe.manifests.alignment import keep_alignment, require_same_alignment
from svgpipe.manifests.cache_manifest import VISION_FROM, CacheManifest
from svgpipe.manifests.cache_writer import complete_store, publish_cache
from svgpipe.manifests.calibration import CALIBRATION, Calibration
from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.feature_store import FeatureStore
from svgpipe.manifests.filesystem import Location, absolute
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.manifest import InputRef
from svgpipe.manifests.model_manifests import AutoencoderManifest
from svgpipe.manifests.recipe import ExtractSection
from svgpipe.manifests.rejects import REJECTS_NAME
from svgpipe.manifests.shards import ShardSet
from svgpipe.manifests.store_spec import StoreSpec
from svgpipe.manifests.workdir import StageSpec, WorkDir

from ..runtime.device import warn_if_imitated
from ..runtime.progress import Progress, Recorded
from ..runtime.runner import LocalRunner, Runner, Steps
from .align import measure_alignment, needs_alignment
from .calibrate import calibrate
from .cpu_tasks import ReadImages, UnitRows, WriteUnit
from .encoder_actor import EncoderOptions, EncodeUnits
from .rejects import MAX_REJECTS, RejectTally
from .timings import Timings
from .vision_source import VisionSource

NAMED_REJECTS = 20


def extract(
    shards: ShardSet,
    autoencoder: Location,
    out: Location,
    config: ExtractSection,
    *,
    max_rejects: float = MAX_REJECTS,
    vision_from: Location | None = None,
    runner: Runner | None = None,
    progress: Progress | None = None,
) -> CacheManifest:
    """Encode every image of `shards` once and publish the cache at `out`; run again to resume.

    An image that cannot be decoded is rejected. It keeps its row, with `valid` False and zeros: samples = valid +
    rejected.

    Args:
        shards: images to encode.
        autoencoder: finished autoencoder.
        out: directory to create or resume.
        config: section `extract` of a recipe.
        max_rejects: maximum fraction of rejected images; not part of the cache's identity.
        vision_from: finished cache of the same shards, vision model and config. Its vision features are copied, and
            only the residual channels are computed. The result is the same; not part of the cache's identity.
        runner: where units run; default: in this process.
        progress: receives the progress.

    Returns:
        The manifest of the cache.

    Raises:
        MismatchError: `out` was begun with another encoder or alignment, other shards or another config; or the vision
            features of `vision_from` are others.
        UsageError: `vision_from` with an autoencoder without vision features, or with int8.
        BusyError: another process works in `out`.
        TooManyRejectsError: more than `max_rejects`, or far more at the start.
        ArtifactError: a damaged input, or a feature that is not finite.
    """
    encoder = AutoencoderManifest.read(autoencoder)
    with WorkDir(cache_spec(shards, encoder.as_input(autoencoder), out, config)) as work:
        require_same_alignment(autoencoder, out)
        if work.finished is not None:
            return work.finished
        if not len(shards):
            raise ArtifactError(f"{shards.directory}: expected images to extract, found none.")
        source = None if vision_from is None else VisionSource.open(vision_from, shards, encoder, config)
        run_on, shown = runner or LocalRunner(), Recorded(progress, out)
        return _Job(shards, autoencoder, encoder, config, run_on, shown, max_rejects, source).run(work)


def cache_spec(
    shards: ShardSet, autoencoder: InputRef, out: Location, config: ExtractSection
) -> StageSpec[CacheManifest]:
    """Return what `extract` is asked to make."""
    inputs = {"shards": shards.as_input(), "autoencoder": autoencoder}
    return StageSpec(out, CacheManifest, config.model_dump(mode="json"), inputs)


@dataclass(frozen=True)
class _Job:
    shards: ShardSet
    autoencoder: Location
    encoder: AutoencoderManifest
    config: ExtractSection
    runner: Runner
    progress: Progress
    max_rejects: float
    source: VisionSource | None

    @property
    def spec(self) -> StoreSpec:
        return StoreSpec(
            num_samples=len(self.shards),
            views=self.config.views,
            grid=self.encoder.grid,
            channels=self.encoder.stored_channels,
            unit_rows=self.config.unit_rows,
            class_names=tuple(self.shards.manifest.class_names),
            dtype=self.config.store_dtype,
        )

    @property
    def options(self) -> EncoderOptions:
        """Options of the encoder before calibration."""
        # Short batches are filled up, so a batch should not be larger than a unit.
        batch_size = min(self.config.batch_size, self.config.unit_rows, len(self.shards))
        return EncoderOptions(absolute(self.autoencoder), batch_size, self.config.precision, self.config.compile)

    @property
    def _computed(self) -> EncoderOptions:
        """Options of the encoder for what is not copied."""
        return replace(self.options, residual_only=self.source is not None)

    def run(self, work: WorkDir[CacheManifest]) -> CacheManifest:
        self._require_few_rejects()
        if self.runner.computes_on_cpu:
            warn_if_imitated(self.config.precision)  # here, because logs of workers are not shown
        if self.source is not None:
            count = self.encoder.residual_channels
            self.progress.say(f"vision features are copied from {self.source.cache.path}; computed: {count} channels")
        if needs_alignment(self.autoencoder, self.encoder):
            measure_alignment(self.shards, self.autoencoder, self.encoder, self.options, self.runner, self.progress)
        keep_alignment(self.autoencoder, work.path)
        journal = Journal(work.path)
        calibration = self._calibration(work, journal)
        store = FeatureStore.create(work.path, self.spec, calibration.mean, calibration.std, calibration.scale)
        timings = self._extract(work, store, journal, calibration).summary()
        if self.source is not None:
            timings[VISION_FROM] = str(self.source.cache.path)
        return self._publish(work, store, journal, timings)

    def _require_few_rejects(self) -> None:
        """Count the rejects of the index before anything is encoded. Raises the error of `RejectTally.add`."""
        total, known = self.spec.num_samples, int(self.shards.rows.rejected.sum())
        RejectTally(total, self.max_rejects).add(total, ["rejected when indexed"] * known)

    def _extract(
        self, work: WorkDir[CacheManifest], store: FeatureStore, journal: Journal, calibration: Calibration
    ) -> Timings:
        """Encode and write the missing units.

        Returns:
            Seconds per worker.
        """
        spec, tally, timings = store.spec, RejectTally(store.spec.num_samples, self.max_rejects), Timings()
        finished = journal.whole(range(spec.num_units))
        for unit, record in finished.items():
            tally.add(len(spec.rows_of(unit)), [reject["reason"] for reject in record.entry["rejects"]])
        self.progress.begin("extract", spec.num_samples, "images", tally.seen)
        units = [UnitRows(unit, spec.rows_of(unit)) for unit in range(spec.num_units) if unit not in finished]
        computed = slice(0 if self.source is None else len(self.source.group), None)
        mean, std = calibration.mean[computed], calibration.std[computed]
        options = replace(self._computed, mean=mean, std=std, views=spec.views)
        steps = Steps(
            ReadImages(self.shards, self.encoder.image_size, self.source),
            partial(EncodeUnits, options=options),
            WriteUnit(store),
        )
        for done in self.runner.run(units, steps):
            work.check_lock()
            _require_seen(journal, done.unit)
            count = len(spec.rows_of(done.unit))
            timings.add(count, done.timings)
            self.progress.advance(count)
            tally.add(count, [reject.reason for reject in done.rejects])
        return timings

    def _calibration(self, work: WorkDir[CacheManifest], journal: Journal) -> Calibration:
        """Return the calibration of an earlier run of this cache, or measure it."""
        if journal.has(CALIBRATION):
            begun = Calibration.read(journal)
            if self.source is not None:
                self.source.require_same_statistics(begun)
            return begun
        calibration = calibrate(
            self.shards, self.encoder, self._computed, self.config, self.runner, self.progress, self.source
        )
        work.check_lock()
        calibration.record(journal)
        return calibration

    def _publish(
        self, work: WorkDir[CacheManifest], store: FeatureStore, journal: Journal, timings: dict[str, Any]
    ) -> CacheManifest:
        spec, rows = store.spec, self.shards.rows
        stored = complete_store(store, journal, rows.label, rows.heldout)
        for reject in stored.rejects[:NAMED_REJECTS]:
            self.progress.say(f"row {reject.row} is not valid: {reject.reason}")
        if (more := len(stored.rejects) - NAMED_REJECTS) > 0:
            self.progress.say(f"… and {more} more rows, see {work.path / REJECTS_NAME}")
        section = self.encoder.section
        manifest = CacheManifest(
            num_samples=len(rows),
            num_valid=int(stored.valid.sum()),
            num_rejected=len(stored.rejects),
            num_heldout=int(rows.heldout.sum()),
            feature_shape=(*spec.grid, spec.channels),
            frozen_channels=self.encoder.frozen_channels,
            views=list(spec.views),
            store_dtype=spec.dtype,
            unit_rows=spec.unit_rows,
            class_names=list(spec.class_names),
            backbone=section.backbone.title if section.encodes_with_backbone else f"{section.kind} encoder",
            backbone_weights=section.backbone.weights if section.encodes_with_backbone else "trained",
            content=stored.content,
            distribution=self.encoder.distribution,
            num_bytes=stored.num_bytes,
            timings=timings,
        )
        return publish_cache(work, manifest, store)


def _require_seen(journal: Journal, unit: int) -> None:
    """Check that this process sees what a worker, perhaps on another node, has written.

    Raises:
        ArtifactError: it does not.
    """
    try:
        journal.check(unit)
    except ArtifactError as error:
        raise ArtifactError(
            f"{error} A worker has just written it, but this process does not see it: the cache must be visible on all "
            "nodes, in a shared folder or an object store."
        ) from error
