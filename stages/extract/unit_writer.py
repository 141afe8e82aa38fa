"""What every stage that writes a cache does with a unit, and at the end. No torch: it runs in light processes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svgpipe.manifests.cache import CacheManifest
from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.feature_store import Features, FeatureStore
from svgpipe.manifests.filesystem import file_sha256, file_size
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.manifest import Json
from svgpipe.manifests.store_spec import StoreSpec

from ..runtime.selection import choose_evenly
from .moments import Moments, merge_all
from .rejects import Reject
from .timings import Stopwatch

REJECTS_NAME = "rejected.jsonl"
LOOKS_AT_ONCE = 16
# Rows that the covariance is taken over: with 256 tokens each, 300 vectors per entry of a row of 392 channels.
COVARIANCE_ROWS = 512


def write_unit(
    store: FeatureStore, journal: Journal, unit: int, features: Features, rejects: Sequence[Reject]
) -> Stopwatch:
    """Write one outer shard whole, then its journal record with its statistics; returns where the time went.

    Args:
        features: (rows, views, row, column, channel) float16, normalised; zeros where rejected.
        rejects: one entry per unusable row, `row` counted inside the unit.
    """
    watch = Stopwatch("writer")
    with watch.phase("write"):
        stored = store.write_unit(unit, features)
    with watch.phase("statistics"):
        valid = np.ones(len(features), bool)
        valid[[reject.row for reject in rejects]] = False
        moments = Moments.of(stored[valid], store.feature_scale)
    with watch.phase("write"):
        file = store.unit_file(unit)
        entry = {
            "sha256": file_sha256(file),
            "num_bytes": file_size(file),
            "rejects": [asdict(reject) for reject in rejects],
            "moments": moments.to_json(),
        }
        journal.record(unit, entry)
    return watch


def unit_record(store: FeatureStore, journal: Journal, unit: int) -> Json:
    """The record of a unit that is there: its shard file has the size that was recorded.

    Raises:
        ArtifactError: either is missing or not what it was.
    """
    record = journal.read(unit)
    if not isinstance(record.get("num_bytes"), int) or not isinstance(record.get("rejects"), list):
        raise ArtifactError(f"{journal.directory}: unit {unit}: its record is damaged.")
    file = store.unit_file(unit)
    if (size := file_size(file)) != record["num_bytes"]:
        found = "no such file" if size is None else f"{size}"
        raise ArtifactError(f"{file}: expected {record['num_bytes']} bytes, found {found}.")
    return record


def find_record(store: FeatureStore, journal: Journal, unit: int) -> Json | None:
    """`unit_record`, or None where it raises."""
    try:
        return unit_record(store, journal, unit)
    except ArtifactError:
        return None


def take_stock(store: FeatureStore, journal: Journal) -> dict[int, Json]:
    """Records of the units that are whole, by number. What else the journal calls finished is forgotten.

    A record may outlive its shard file: after a disk was restored in part, or a clean-up by hand.
    """
    named = sorted(unit for unit in journal.finished() if unit < store.spec.num_units)
    # Many at a time, since an object store answers slowly.
    with ThreadPoolExecutor(LOOKS_AT_ONCE) as pool:
        found = dict(zip(named, pool.map(partial(find_record, store, journal), named), strict=True))
    for unit, record in found.items():
        if record is None:
            journal.forget(unit)
    return {unit: record for unit, record in found.items() if record is not None}


def all_records(store: FeatureStore, journal: Journal) -> list[Json]:
    """Records of all units, in their order, before a cache is published.

    Raises:
        ArtifactError: a unit is not whole any more; it is forgotten, so that the next run makes it.
    """
    records = take_stock(store, journal)
    lost = [unit for unit in range(store.spec.num_units) if unit not in records]
    if lost:
        raise ArtifactError(
            f"{store.path}: {len(lost)} of {store.spec.num_units} units that were written are not whole any more "
            f"(the first is {store.unit_file(lost[0])}). Run the command again: it makes these, and no others."
        )
    return [records[unit] for unit in range(store.spec.num_units)]


def rejects_of(records: Sequence[Json], spec: StoreSpec) -> list[Reject]:
    """Rejects of all units, `row` counted in the whole cache."""
    return [
        Reject(**{**reject, "row": spec.rows_of(unit)[reject["row"]]})
        for unit, record in enumerate(records)
        for reject in record["rejects"]
    ]


def reject_lines(records: Sequence[Json], spec: StoreSpec) -> bytes:
    """Content of rejected.jsonl."""
    return "".join(json.dumps(asdict(reject), sort_keys=True) + "\n" for reject in rejects_of(records, spec)).encode()


def put_statistics(store: FeatureStore, records: Sequence[Json], valid: NDArray[np.bool_]) -> None:
    """Store the statistics of what was written.

    Mean, std, min and max are exact: the records' moments, merged in the order of the units. The covariance is that
    of the original view of some rows: over everything it would cost more CPU time than decoding the images.

    Args:
        records: of all units, in their order. valid: (samples,)
    """
    channels = store.spec.channels
    total = merge_all((Moments.from_json(record.get("moments"), channels) for record in records), channels)
    finite = total if total.count else Moments.of(np.zeros((1, channels)))
    store.put("stored_mean", finite.mean.astype(np.float32), "channel")
    store.put("stored_std", finite.std.astype(np.float32), "channel")
    store.put("stored_min", finite.minimum.astype(np.float32), "channel")
    store.put("stored_max", finite.maximum.astype(np.float32), "channel")
    usable = np.flatnonzero(valid)
    rows = choose_evenly(usable.tolist(), COVARIANCE_ROWS)
    vectors = store.read(rows).reshape(-1, channels) if rows else np.zeros((1, channels))
    store.put("stored_covariance", covariance_of(vectors), "channel", "other_channel")


def publish_cache(manifest: CacheManifest, store: FeatureStore) -> CacheManifest:
    """Describe the store by its manifest, then publish that: the last file written."""
    sealed = manifest.sealed()
    outside = {"finished_at", "seconds", "timings"}
    store.describe({"svgpipe": sealed.model_dump(mode="json", exclude=outside)})
    return sealed.publish(store.path)


def covariance_of(vectors: NDArray[Any]) -> NDArray[np.float64]:
    """(n,C) values → (C,C) population covariance."""
    deviations = vectors.astype(np.float64)
    deviations -= deviations.mean(axis=0)
    return deviations.T @ deviations / max(1, len(deviations))
