"""The CPU tasks around the sampling and decoding actors of an evaluation.

Apart from sample_and_eval.py so that the processes that run them need not load torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveInt

from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.figure import Record
from svgpipe.manifests.index import ImageRef
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.shards import TarImage, shard_name, write_tar
from svgpipe.manifests.storage import Location, file_sha256, location
from svgpipe.manifests.store import FeatureStore
from svgpipe.manifests.store_spec import StoreSpec

from ..images.decode import centre_crop, decode_member, encode_png, to_array
from .shared_images import SharedImages

Row = dict[str, Any]


def pass_on(row: Row) -> Row:
    """Nothing to read."""
    return row


class LatentsRecord(Record):
    """What the journal of a store of latents says of an outer shard."""

    sha256: str
    num_bytes: int
    rows: PositiveInt


@dataclass(frozen=True)
class WriteLatents:
    """CPU task: one outer shard of one setting, then its record in that store's journal."""

    paths: list[Location]
    specs: list[StoreSpec]

    def __call__(self, row: Row) -> Row:
        setting, number = int(row["setting"]), int(row["number"])
        store = FeatureStore(self.paths[setting], self.specs[setting])
        store.write_unit(number, np.ascontiguousarray(row["latents"]))
        file = store.unit_file(number)
        record = LatentsRecord(sha256=file_sha256(file), num_bytes=file.stat().st_size, rows=len(row["latents"]))
        Journal(store.path / "journal").record(number, record.model_dump())
        return {"unit": row["unit"]}


def _latents(store: FeatureStore, indices: list[int]) -> NDArray[np.float32]:
    """Raises ArtifactError for damage within files of the right size: what has another size was drawn anew."""
    try:
        return store.read(indices).astype(np.float32)
    except ArtifactError as error:
        files = ", ".join(str(store.unit_file(unit)) for unit in sorted({i // store.spec.unit_rows for i in indices}))
        raise ArtifactError(f"{error} Delete {files}; the same command then draws it anew.") from error


@dataclass(frozen=True)
class ReadForDecoding:
    """CPU task: latents of a store, or pixels of real images, or nothing for noise."""

    size: int

    def __call__(self, row: Row) -> Row:
        job = json.loads(row["job"])
        empty = np.zeros((0,), np.float32)
        latents = pixels = empty
        if job["store"] is not None:
            latents = _latents(FeatureStore.open(location(job["store"])), job["indices"])
        if job["refs"]:
            images = (decode_member(ImageRef(location(tar), *where)) for tar, *where in job["refs"])
            pixels = np.stack([to_array(centre_crop(image, self.size)) for image in images])
        return {**row, "latents": latents, "pixels": pixels}


@dataclass(frozen=True)
class WriteImages:
    """CPU task: one tar, then its journal record, then other evaluations may find it."""

    out: Location
    journal: Location
    shared: SharedImages

    def __call__(self, row: Row) -> Row:
        job = json.loads(row["job"])
        folder = self.out / "images" / job["set"]
        members = [
            TarImage(f"{index:08d}", encode_png(pixels), "png", label)
            for index, label, pixels in zip(job["indices"], job["labels"], np.asarray(row["images"]), strict=True)
        ]
        shard = write_tar(folder / shard_name(job["number"]), members, "train")
        Journal(self.journal).record(int(row["unit"]), {"set": job["set"], "shard": shard.model_dump()})
        self.shared.give(job["key"], folder / shard.name, shard)
        return {"unit": row["unit"]}
