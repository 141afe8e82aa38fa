"""`svgpipe requantize`: convert a cache to another dtype.

Whole outer shards are read and written, with one journal record each; a killed run resumes.
requantize_cost.py measures the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from svgpipe.manifests.alignment import keep_alignment
from svgpipe.manifests.cache import FeatureCache
from svgpipe.manifests.cache_manifest import CacheManifest
from svgpipe.manifests.cache_writer import complete_store, publish_cache, write_unit
from svgpipe.manifests.calibration import CALIBRATION, Calibration
from svgpipe.manifests.errors import ArtifactError, UsageError
from svgpipe.manifests.feature_store import FeatureStore
from svgpipe.manifests.filesystem import Location, absolute
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.rejects import Reject
from svgpipe.manifests.selection import choose_evenly, evenly_spread
from svgpipe.manifests.store_spec import StoreDtype
from svgpipe.manifests.workdir import StageSpec, WorkDir

from ..extract.quantization import SAMPLED_VECTORS, int8_scales
from ..runtime.processes import map_in_processes
from ..runtime.progress import Progress, Recorded
from ..runtime.resources import cpu_count

# Rows that int8 steps are chosen on; each gives an even share of its vectors.
SAMPLED_ROWS = 512


def requantize(
    source: Location,
    out: Location,
    dtype: StoreDtype,
    *,
    processes: int | None = None,
    progress: Progress | None = None,
) -> CacheManifest:
    """Write the cache at `source` again at `out`, with features stored as `dtype`; run again to resume.

    Args:
        source: finished cache.
        out: directory to create or resume.
        dtype: of the new cache.
        processes: number of processes; None: one per core.
        progress: receives the progress.

    Returns:
        The manifest of the new cache.

    Raises:
        MismatchError: `out` was begun from another cache or with another dtype.
        UsageError: `source` is `out`, or is stored as `dtype`.
        BusyError: another process works in `out`.
        ArtifactError: `source` is unfinished or damaged.
    """
    cache = FeatureCache(source)
    before = cache.manifest
    if absolute(source) == absolute(out):
        raise UsageError(f"{out}: is the cache itself; give another --out.")
    if before.store_dtype == dtype:
        raise UsageError(f"{source}: is already stored as {dtype}.")
    inputs = {**before.inputs, "cache": before.as_input(source)}
    with WorkDir(StageSpec(out, CacheManifest, {**before.config, "store_dtype": dtype}, inputs)) as work:
        if work.finished is not None:
            return work.finished
        progress = Recorded(progress, out)
        keep_alignment(source, out)
        journal = Journal(out)
        calibration = _calibration(cache, dtype, journal, progress)
        spec = before.model_copy(update={"store_dtype": dtype}).spec
        store = FeatureStore.create(out, spec, calibration.mean, calibration.std, calibration.scale)
        missing = journal.missing(range(spec.num_units))
        progress.begin("requantize", spec.num_units, "units", spec.num_units - len(missing))
        places = (absolute(place) for place in (source, out))
        convert = _Convert(*(FeatureStore(place, s) for place, s in zip(places, (before.spec, spec), strict=True)))
        for _ in map_in_processes(convert, missing, processes or cpu_count()):
            work.check_lock()
            progress.advance()
        return _publish(work, cache, store, journal, dtype)


def _publish(
    work: WorkDir[CacheManifest], cache: FeatureCache, store: FeatureStore, journal: Journal, dtype: StoreDtype
) -> CacheManifest:
    before = cache.manifest
    stored = complete_store(store, journal, cache.store.array("label"), cache.store.array("heldout"))
    manifest = CacheManifest.model_validate(
        {
            **before.model_dump(exclude={"finished_at", "svgpipe_version", "fingerprint", "timings"}),
            "store_dtype": dtype,
            "content": stored.content,
            "num_bytes": stored.num_bytes,
        }
    )
    return publish_cache(work, manifest, store)


def _calibration(cache: FeatureCache, dtype: StoreDtype, journal: Journal, progress: Progress) -> Calibration:
    if journal.has(CALIBRATION):
        return Calibration.read(journal)
    scale = None
    if dtype == "int8":
        usable = cache.training_rows
        usable = usable if len(usable) else np.flatnonzero(cache.valid)
        rows = choose_evenly(usable.tolist(), SAMPLED_ROWS)
        if not rows:
            raise ArtifactError(f"{cache.path}: expected valid rows to choose int8 steps on, found none.")
        progress.say(f"choosing int8 steps on {len(rows)} rows")
        vectors = cache.read(rows).reshape(-1, cache.shape[-1])
        scale = int8_scales(vectors[evenly_spread(len(vectors), SAMPLED_VECTORS)].astype(np.float32))
    calibration = Calibration(cache.channel_mean, cache.channel_std, scale)
    calibration.record(journal)
    return calibration


@dataclass(frozen=True)
class _Convert:
    """Converts one outer shard and writes its journal record."""

    source: FeatureStore
    target: FeatureStore

    def __call__(self, unit: int) -> None:
        features = self.source.dequantize(self.source.read_unit(unit)).astype(np.float16, copy=False)
        rejects = [Reject(**entry) for entry in Journal(self.source.path).read(unit)["rejects"]]
        write_unit(self.target, Journal(self.target.path), unit, features, rejects)
