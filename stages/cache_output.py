"""What every stage that writes a cache does with a unit, and at the end. No torch: it runs in light processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from svgpipe.manifests.cache import CacheManifest
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.storage import file_sha256, file_size
from svgpipe.manifests.store import Features, FeatureStore
from svgpipe.stages.moments import Moments, merge_all
from svgpipe.stages.timings import Stopwatch


def write_unit(
    store: FeatureStore, journal: Journal, unit: int, features: Features, rejects: Sequence[dict[str, Any]]
) -> Stopwatch:
    """Write one outer shard whole, then its statistics, then its journal record; returns where the time went.

    Args:
        features: (rows, views, row, column, channel) float16, normalised; zeros where rejected.
        rejects: one entry per unusable row, `row` counted inside the unit.
    """
    watch = Stopwatch("writer")
    with watch.phase("write"):
        stored = store.write_unit(unit, features)
    with watch.phase("statistics"):
        valid = np.ones(len(features), bool)
        valid[[reject["row"] for reject in rejects]] = False
        moments = Moments.of(stored[valid], store.feature_scale)
    with watch.phase("write"):
        file = store.unit_file(unit)
        entry = {"sha256": file_sha256(file), "num_bytes": file_size(file), "rejects": list(rejects)}
        journal.record(unit, entry, moments.to_bytes())
    return watch


def put_statistics(store: FeatureStore, journal: Journal) -> None:
    """Merge the statistics of all units in their order, and store them."""
    channels = store.spec.channels
    units = range(store.spec.num_units)
    total = merge_all((Moments.from_bytes(journal.attachment(unit), channels) for unit in units), channels)
    finite = total if total.count else Moments.of(np.zeros((1, channels)))
    store.put("stored_mean", finite.mean.astype(np.float32), "channel")
    store.put("stored_std", finite.std.astype(np.float32), "channel")
    store.put("stored_min", finite.minimum.astype(np.float32), "channel")
    store.put("stored_max", finite.maximum.astype(np.float32), "channel")
    store.put("stored_covariance", finite.covariance, "channel", "other_channel")


def publish_cache(manifest: CacheManifest, store: FeatureStore) -> CacheManifest:
    """Describe the store by its manifest, then publish that: the last file written."""
    sealed = manifest.sealed()
    outside = {"finished_at", "seconds", "timings"}
    store.describe({"svgpipe": sealed.model_dump(mode="json", exclude=outside)})
    return sealed.publish(store.path)
