"""The CPU tasks around the sampling and decoding actors of an evaluation.

Apart from sample_and_eval.py so that the processes that run them need not load torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from svgpipe.manifests.index import ImageRef
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.shards import TarImage, shard_name, write_tar
from svgpipe.manifests.storage import Location, file_sha256, file_size, location
from svgpipe.manifests.store import FeatureStore
from svgpipe.manifests.store_spec import StoreSpec
from svgpipe.stages.images import centre_crop, decode_member, encode_png, to_array
from svgpipe.stages.shared_images import SharedImages

Row = dict[str, Any]


def pass_on(row: Row) -> Row:
    """Nothing to read."""
    return row


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
        Journal(store.path / "journal").record(
            number, {"sha256": file_sha256(file), "num_bytes": file_size(file), "rows": len(row["latents"])}
        )
        return {"unit": row["unit"]}


@dataclass(frozen=True)
class ReadForDecoding:
    """CPU task: latents of a store, or pixels of real images, or nothing for noise."""

    size: int

    def __call__(self, row: Row) -> Row:
        job = json.loads(row["job"])
        empty = np.zeros((0,), np.float32)
        latents = pixels = empty
        if job["store"] is not None:
            latents = FeatureStore.open(location(job["store"])).read(job["indices"]).astype(np.float32)
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
