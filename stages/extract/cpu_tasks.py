"""The CPU tasks around the encoder actors of an extraction: read and decode, write, collect statistics.

Apart from extract.py so that the processes that run them need not load torch.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.index import ImageRef
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.shards import ShardSet
from svgpipe.manifests.storage import absolute
from svgpipe.manifests.store import FeatureStore

from ..images.decode import RejectedImageError, centre_crop, decode_image, to_array
from .moments import Moments
from .timings import Stopwatch
from .unit_writer import find_record, write_unit

Row = dict[str, Any]


class ReadImages:
    """CPU task: range reads, decode, ADM centre crop. Opens only the indexes of the tars that a unit needs."""

    def __init__(self, shards: ShardSet, image_size: int) -> None:
        self.shards, self.image_size = shards.absolute(), image_size

    def __call__(self, row: Row) -> Row:
        watch = Stopwatch("reader")
        with watch.phase("read"):
            refs = self.shards.refs([int(r) for r in row["rows"]])
        pixels = np.zeros((len(refs), self.image_size, self.image_size, 3), np.uint8)
        rejects = []
        for i, ref in enumerate(refs):
            try:
                if ref.reject is not None:
                    raise RejectedImageError(ref.reject)
                with watch.phase("read"):
                    data = self._bytes(ref)
                with watch.phase("decode"):
                    pixels[i] = to_array(centre_crop(decode_image(data), self.image_size))
            except RejectedImageError as error:
                reason = str(error)
                rejects.append({"row": i, "tar": str(ref.tar), "offset": ref.offset, "key": ref.key, "reason": reason})
        return {
            "unit": row["unit"],
            "pixels": pixels,
            "rejects": json.dumps(rejects),
            "timings": json.dumps([watch.entry()]),
        }

    def _bytes(self, ref: ImageRef) -> bytes:
        """What was indexed, or after a second look a reject: a network file system may give a short read once."""
        try:
            return ref.read()
        except ArtifactError:
            try:
                return ref.read()
            except ArtifactError as error:
                raise RejectedImageError(f"other bytes than indexed: {error}") from error


class WriteUnit:
    """CPU task: one outer shard, whole, then its statistics, then its journal record."""

    def __init__(self, store: FeatureStore, journal: Journal) -> None:
        self.path, self.spec, self.journal_path = absolute(store.path), store.spec, absolute(journal.directory)

    def __call__(self, row: Row) -> Row:
        unit, features = int(row["unit"]), np.ascontiguousarray(row["features"])
        store, journal = FeatureStore(self.path, self.spec), Journal(self.journal_path)
        if find_record(store, journal, unit) is not None:
            # Ray has run the task twice, after a node seemed lost: the first one's bytes are on record.
            return {"unit": unit, "rejects": row["rejects"], "timings": row["timings"]}
        watch = write_unit(store, journal, unit, features, json.loads(row["rejects"]))
        timings = [*json.loads(row["timings"]), watch.entry()]
        return {"unit": unit, "rejects": row["rejects"], "timings": json.dumps(timings)}


class CollectMoments:
    """CPU task of the calibration pass: statistics instead of a write, and some vectors to choose int8 steps by."""

    def __init__(self, sampled_vectors: int) -> None:
        self.sampled_vectors = sampled_vectors

    def __call__(self, row: Row) -> Row:
        valid = np.ones(len(row["features"]), bool)
        valid[[reject["row"] for reject in json.loads(row["rejects"])]] = False
        features = row["features"][valid]
        flat = features.reshape(-1, features.shape[-1])
        chosen = np.linspace(0, len(flat) - 1, min(self.sampled_vectors, len(flat))).round().astype(int)
        return {
            "unit": row["unit"],
            "moments": Moments.of(features).to_bytes(),
            "sample": np.ascontiguousarray(flat[chosen]),
        }
