"""The CPU tasks around the encoder actors of an extraction: read and decode, write, collect moments.

Apart from extract.py so that the processes that run them need not load torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from svgpipe.manifests.cache import FeatureStore
from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.manifest import file_sha256
from svgpipe.manifests.shards import read_member
from svgpipe.stages.images import RejectedImageError, centre_crop, decode_image, to_array
from svgpipe.stages.moments import Moments

Row = dict[str, Any]


class ReadImages:
    """CPU task: range reads, decode, ADM centre crop."""

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size

    def __call__(self, row: Row) -> Row:
        refs = json.loads(row["refs"])
        pixels = np.zeros((len(refs), self.image_size, self.image_size, 3), np.uint8)
        rejects = []
        for i, (tar, offset, size, sha256, key) in enumerate(refs):
            try:
                data = read_member(Path(tar), offset, size, sha256)
                pixels[i] = to_array(centre_crop(decode_image(data), self.image_size))
            except (RejectedImageError, ArtifactError) as error:
                rejects.append({"row": i, "tar": tar, "offset": offset, "key": key, "reason": str(error)})
        return {"unit": row["unit"], "pixels": pixels, "rejects": json.dumps(rejects)}


class WriteUnit:
    """CPU task: one outer shard, whole, then its journal record."""

    def __init__(self, store: FeatureStore, journal: Journal) -> None:
        self.path, self.spec, self.journal_path = store.path.resolve(), store.spec, journal.directory.resolve()

    def __call__(self, row: Row) -> Row:
        unit, features = int(row["unit"]), np.ascontiguousarray(row["features"])
        rejects = json.loads(row["rejects"])
        store = FeatureStore(self.path, self.spec)
        store.write_unit(unit, features)
        valid = np.ones(len(features), bool)
        valid[[reject["row"] for reject in rejects]] = False
        entry = {
            "sha256": file_sha256(store.unit_file(unit)),
            "num_bytes": store.unit_file(unit).stat().st_size,
            "rejects": rejects,
            "moments": Moments.of(features[valid]).as_json(),
        }
        Journal(self.journal_path).record(unit, entry)
        return {"unit": unit}


class CollectMoments:
    """CPU task of the calibration pass: moments instead of a write."""

    def __call__(self, row: Row) -> Row:
        valid = np.ones(len(row["features"]), bool)
        valid[[reject["row"] for reject in json.loads(row["rejects"])]] = False
        return {"unit": row["unit"], "moments": json.dumps(Moments.of(row["features"][valid]).as_json())}
