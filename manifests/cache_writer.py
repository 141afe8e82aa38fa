"""Writes units of a cache and completes it. Does not need torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cache_manifest import CacheManifest
from .errors import ArtifactError
from .feature_store import Features, FeatureStore
from .filesystem import write_atomic
from .journal import Journal
from .manifest import Json
from .moments import Moments
from .rejects import REJECTS_NAME, Reject, reject_lines, rejects_of
from .selection import choose_evenly
from .store_spec import unit_name
from .workdir import WorkDir

# Rows for the covariance: with 256 tokens each, 300 vectors per entry of a row of 392 channels.
COVARIANCE_ROWS = 512


def write_unit(
    store: FeatureStore,
    journal: Journal,
    unit: int,
    features: Features,
    rejects: Sequence[Reject],
    phase: Callable[[str], AbstractContextManager[None]] = lambda _: nullcontext(),
) -> None:
    """Write one outer shard, then its journal record with its statistics.

    Args:
        store: store of the cache.
        journal: journal of the cache.
        unit: number of the outer shard.
        features: (rows, views, row, column, channel) float16, normalised; zeros for rejected rows.
        rejects: one entry per rejected row, `row` counted within the unit.
        phase: times the phases `write` and `statistics`.
    """
    with phase("write"):
        stored = store.write_unit(unit, features)
    with phase("statistics"):
        valid = np.ones(len(features), bool)
        valid[[reject.row for reject in rejects]] = False
        moments = Moments.of(stored[valid], store.feature_scale)
    with phase("write"):
        entry = {"rejects": [asdict(reject) for reject in rejects], "moments": moments.to_json()}
        journal.record(unit, entry, {unit_name(unit): None})


@dataclass(frozen=True)
class StoredUnits:
    """Content of all units of a store."""

    rejects: list[Reject]  # `row` counted in the whole cache
    valid: NDArray[np.bool_]  # (samples,)
    content: str
    num_bytes: int


def complete_store(store: FeatureStore, journal: Journal, labels: NDArray[Any], heldout: NDArray[Any]) -> StoredUnits:
    """Write the small arrays, statistics and rejects of a cache.

    Args:
        store: store of the cache.
        journal: journal of the cache.
        labels: (samples,) class indexes.
        heldout: (samples,) held-out flags.

    Returns:
        Rejects, valid rows, content and size.

    Raises:
        ArtifactError: a unit is damaged. The next run makes it again.
    """
    units, spec = range(store.spec.num_units), store.spec
    records = journal.whole(units)
    if lost := [unit for unit in units if unit not in records]:
        raise ArtifactError(
            f"{store.path}: {len(lost)} of {len(units)} units that were written are damaged or missing "
            f"(the first is {store.unit_file(lost[0])}). Run the command again: it makes only these."
        )
    entries, files = [records[unit].entry for unit in units], [file for unit in units for file in records[unit].files]
    rejects, valid = rejects_of(entries, spec), np.ones(spec.num_samples, bool)
    valid[[reject.row for reject in rejects]] = False
    for name, values in {"label": labels, "valid": valid, "heldout": heldout}.items():
        store.put(name, values, "sample")
    _put_statistics(store, entries, valid)
    write_atomic(store.path / REJECTS_NAME, reject_lines(rejects))
    content = CacheManifest.content_of(store, [file.sha256 for file in files])
    return StoredUnits(rejects, valid, content, sum(file.num_bytes for file in files))


def _put_statistics(store: FeatureStore, records: Sequence[Json], valid: NDArray[np.bool_]) -> None:
    """Store the statistics of the stored values.

    Mean, std, min and max are exact: the moments of the records, merged in order. The covariance is of the original
    view of some rows, because for all rows it would need more CPU time than decoding the images.
    """
    channels = store.spec.channels
    total = Moments.empty(channels)
    for record in records:
        total = total.merge(Moments.from_json(record.get("moments"), channels))
    finite = total if total.count else Moments.of(np.zeros((1, channels)))
    named = {"mean": finite.mean, "std": finite.std, "min": finite.minimum, "max": finite.maximum}
    for name, values in named.items():
        store.put(f"stored_{name}", values.astype(np.float32), "channel")
    rows = choose_evenly(np.flatnonzero(valid).tolist(), COVARIANCE_ROWS)
    vectors = store.read(rows).reshape(-1, channels) if rows else np.zeros((1, channels))
    store.put("stored_covariance", covariance_of(vectors), "channel", "other_channel")


def publish_cache(work: WorkDir[CacheManifest], manifest: CacheManifest, store: FeatureStore) -> CacheManifest:
    """Write the description of the store, then the manifest.

    Returns:
        The manifest as written.
    """
    work.check_lock()
    complete = work.completed(manifest)
    facts = complete.model_dump(mode="json", exclude={"finished_at", "seconds", "timings", "inputs"})
    facts["inputs"] = {name: ref.fingerprint for name, ref in complete.inputs.items()}  # without their places
    store.describe({"svgpipe": facts})
    return work.publish(manifest)


def covariance_of(vectors: NDArray[Any]) -> NDArray[np.float64]:
    """Return the (C,C) population covariance of (n,C) values."""
    deviations = vectors.astype(np.float64)
    deviations -= deviations.mean(axis=0)
    return deviations.T @ deviations / max(1, len(deviations))
