"""The batch stage that turns latents, real images and noise into 8-bit images in WebDataset tars, on Ray workers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from svgpipe.manifests.alignment import MeasuredAlignment
from svgpipe.manifests.checkpoint import AutoencoderManifest
from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.index import ImageRef, read_index, refs_of_table
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.manifest import digest, svgpipe_version
from svgpipe.manifests.report_file import evaluate_again
from svgpipe.manifests.shards import ShardFile, shard_name
from svgpipe.manifests.storage import Location, absolute, children, has_sha256, make_directory, remove_partials

from ..images.decode import decode_image
from ..images.image_set import ImageSet
from ..images.tensors import as_pixels
from ..networks.autoencoder import load_autoencoder, reconstruct
from ..networks.sampling import initial_noise
from ..runtime.progress import Progress
from ..runtime.runner import Resources, Row, run_units, start_worker
from .cpu_tasks import ReadForDecoding, WriteImages
from .shared_images import SharedImages


@dataclass(frozen=True)
class ImageJob:
    """One set of images to be made: from a store of latents, from real images, or, without either, from noise.

    labels: of the latents; real images bring theirs, noise has none and is given 0.
    contents: of the latents, a digest of those of each unit: what decoded images are found again by.
    residual: of real images, False encodes them without the residual branch.
    """

    name: str
    count: int
    store: Location | None = None
    labels: Sequence[int] = ()
    contents: Sequence[str] = ()
    originals: Sequence[ImageRef] = ()
    residual: bool = True

    def units(self, rows: int) -> list[dict[str, Any]]:
        """What each unit needs to know, as JSON values."""
        labels = self.labels or [ref.label for ref in self.originals] or [0] * self.count
        store = None if self.store is None else str(absolute(self.store))
        return [
            {
                "set": self.name,
                "number": number,
                "residual": self.residual,
                "store": store,
                "indices": list(range(first, min(first + rows, self.count))),
                "labels": [int(label) for label in labels[first : min(first + rows, self.count)]],
                "content": self.contents[number] if self.contents else store,
                "refs": [
                    [str(absolute(r.tar)), r.offset, r.size, r.sha256, r.key, r.label]
                    for r in self.originals[first : first + rows]
                ],
            }
            for number, first in enumerate(range(0, self.count, rows))
        ]


def decode(
    jobs: Sequence[ImageJob],
    autoencoder: Location,
    out: Location,
    *,
    pool: Location,
    mean: NDArray[np.float32],
    std: NDArray[np.float32],
    size: int,
    seed: int,
    unit_rows: int,
    batch_size: int,
    resources: Resources,
    progress: Progress,
) -> dict[str, list[ShardFile]]:
    """Tars of every set below `out`/images, by name; run again to resume. Ray must be connected.

    Args:
        pool: holds `decoded`, where other evaluations find the same tars.
        mean, std: (C,) what latents are denormalised with.
        size: side of the images. seed: of the noise.
        unit_rows: images per tar, the unit of resume. batch_size: no image depends on it but by rounding.
    """
    units = [unit for job in jobs for unit in job.units(unit_rows)]
    journal = Journal(out / "journal" / "decode")
    remove_partials(journal.directory)
    for job in jobs:
        make_directory(out / "images" / job.name)
        remove_partials(out / "images" / job.name)
    shared = SharedImages(absolute(pool / "decoded"))
    decides = _decides(autoencoder, mean, std, seed, size)
    missing = []
    for number in missing_units(journal, units, out / "images"):
        unit = units[number]
        unit["key"] = _key(unit, decides)
        shard = shared.take(unit["key"], out / "images" / unit["set"] / shard_name(unit["number"]))
        if shard is None:
            missing.append(number)
        else:
            journal.record(number, {"set": unit["set"], "shard": shard.model_dump()})
    progress.begin("decode", len(units), len(units) - len(missing))
    items = [{"unit": number, "job": json.dumps(units[number])} for number in missing]
    args = {
        "autoencoder": absolute(autoencoder),
        "mean": mean,
        "std": std,
        "seed": seed,
        "batch_size": batch_size,
        "threads": resources.threads,
    }
    writer = WriteImages(absolute(out), absolute(journal.directory), shared)
    for _ in run_units(items, ReadForDecoding(size), _Decode, args, writer, resources):
        progress.advance()
    found: dict[str, list[ShardFile]] = {job.name: [] for job in jobs}
    for number, unit in enumerate(units):
        found[unit["set"]].append(ShardFile.model_validate(journal.read(number)["shard"]))
    return found


def _decides(
    autoencoder: Location, mean: NDArray[np.float32], std: NDArray[np.float32], seed: int, size: int
) -> list[Any]:
    """What decides all images of an evaluation."""
    measured = MeasuredAlignment.read(autoencoder)
    return [
        svgpipe_version(),
        AutoencoderManifest.read(autoencoder).fingerprint,
        None if measured is None else measured.scalars,
        [mean.tolist(), std.tolist()],
        seed,
        size,
    ]


def _key(unit: dict[str, Any], decides: list[Any]) -> str:
    """Of all that decides a unit's tar; not where its latents or originals lie."""
    originals = [[sha256, label] for _, _, _, sha256, _, label in unit["refs"]]
    own = [unit[name] for name in ("number", "residual", "indices", "labels", "content")]
    return digest([decides, own, originals])


def missing_units(journal: Journal, units: Sequence[dict[str, Any]], images: Location) -> list[int]:
    """Units without a record of their own, or whose tar or index is gone or altered.

    The sets may have changed since the records were written: an alignment that there is now allows another.
    """
    finished = journal.finished()

    def is_there(number: int, unit: dict[str, Any]) -> bool:
        tar = images / unit["set"] / shard_name(unit["number"])
        try:
            record = journal.read(number)
            shard = ShardFile.model_validate(record.get("shard"))
        except (ArtifactError, ValidationError):
            return False
        is_its_own = record.get("set") == unit["set"] and shard.name == tar.name
        index = tar.with_suffix(".parquet")
        return is_its_own and has_sha256(tar, shard.sha256) and has_sha256(index, shard.index_sha256)

    return [n for n, unit in enumerate(units) if n not in finished or not is_there(n, unit)]


def decoded_images(evaluation: Location, name: str) -> ImageSet:
    """One set of a finished evaluation, from its tars' own indexes, in order.

    Raises:
        ArtifactError: there are no such images.
    """
    folder = evaluation / "images" / name
    tars = [path for path in children(folder) if path.suffix == ".tar"]
    refs = [ref for tar in tars for ref in refs_of_table(read_index(tar.with_suffix(".parquet"), None), tar)]
    if not refs:
        raise ArtifactError(f"{folder}: expected decoded images, found none. {evaluate_again(evaluation)}")
    return ImageSet(refs, decode_image(refs[0].read()).width)


class _Decode:
    """Actor: latents, real images or noise → 8-bit images, rounded before anything measures them."""

    def __init__(
        self,
        autoencoder: Location,
        mean: NDArray[np.float32],
        std: NDArray[np.float32],
        seed: int,
        batch_size: int,
        threads: int,
    ) -> None:
        self.device = start_worker(threads)
        model, manifest = load_autoencoder(autoencoder)
        self.model, self.grid = model.to(self.device), manifest.grid
        self.mean, self.std = torch.from_numpy(mean), torch.from_numpy(std)
        self.seed, self.batch_size = seed, batch_size

    @torch.inference_mode()
    def _decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """(n,row,column,channel) normalised → (n,H,W,3)."""
        features = (latents * self.std + self.mean).permute(0, 3, 1, 2).to(self.device)
        chunks = features.split(self.batch_size)
        return np.concatenate([as_pixels(self.model.decode(chunk)) for chunk in chunks])

    def __call__(self, row: Row) -> Row:
        job = json.loads(row["job"])
        if job["refs"]:
            pixels = reconstruct(self.model, np.array(row["pixels"]), self.batch_size, residual=job["residual"])
        elif job["store"] is None:
            noise = initial_noise(self.seed, job["indices"], self.grid[0] * self.grid[1], len(self.mean))
            pixels = self._decode(noise.reshape(len(noise), *self.grid, -1))
        else:
            pixels = self._decode(torch.from_numpy(np.array(row["latents"])))
        return {"unit": row["unit"], "job": row["job"], "images": pixels}
