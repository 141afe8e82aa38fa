"""Latents, real images and noise → 8-bit images in WebDataset tars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.filesystem import Location, absolute, children, has_sha256, make_directory, remove_partials
from svgpipe.manifests.index import ImageRef, read_index, refs_of_table
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.report_file import evaluate_again
from svgpipe.manifests.shards import ShardFile, shard_name

from ..images.decode import RGBArray, decode_image
from ..images.image_set import ImageSet
from ..images.tensors import as_pixels
from ..networks.autoencoder import load_autoencoder, reconstruct
from ..networks.sampling import initial_noise
from ..runtime.progress import Progress
from ..runtime.runner import Runner, Steps
from .cpu_tasks import DecodedUnit, ImageSources, ImageUnit, ReadForDecoding, WriteImages


@dataclass(frozen=True)
class ImageJob:
    """One set of images to be made: from a store of latents, from real images, or, without either, from noise.

    labels: of the latents; real images bring theirs, noise has none and is given 0.
    residual: of real images, False encodes them without the residual branch.
    """

    name: str
    count: int
    store: Location | None = None
    labels: Sequence[int] = ()
    originals: Sequence[ImageRef] = ()
    residual: bool = True

    def units(self, rows: int, first_number: int) -> list[ImageUnit]:
        """Tars of `rows` images; the journal counts them from `first_number`."""
        labels = self.labels or [ref.label for ref in self.originals] or [0] * self.count
        originals = [replace(ref, tar=absolute(ref.tar)) for ref in self.originals]
        return [
            ImageUnit(
                number=first_number + shard,
                set_name=self.name,
                shard=shard,
                indices=range(first, min(first + rows, self.count)),
                labels=[int(label) for label in labels[first : min(first + rows, self.count)]],
                store=None if self.store is None else absolute(self.store),
                originals=originals[first : first + rows],
                residual=self.residual,
            )
            for shard, first in enumerate(range(0, self.count, rows))
        ]


@dataclass(frozen=True)
class DecoderOptions:
    """What decides decoded images besides their sources.

    mean, std: (C,) what latents are denormalised with.
    size: side of the images in pixels. seed: of the noise.
    unit_rows: images per tar, the unit of resume. batch_size: no image depends on it but by rounding.
    """

    autoencoder: Location
    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    size: int
    seed: int
    unit_rows: int
    batch_size: int


def decode(
    jobs: Sequence[ImageJob], options: DecoderOptions, out: Location, runner: Runner, progress: Progress
) -> dict[str, list[ShardFile]]:
    """Tars of every set below `out`/images, by name; run again to resume."""
    units: list[ImageUnit] = []
    for job in jobs:
        units += job.units(options.unit_rows, len(units))
        make_directory(out / "images" / job.name)
        remove_partials(out / "images" / job.name)
    journal = Journal(out / "journal" / "decode")
    remove_partials(journal.directory)
    missing = missing_units(journal, units, out / "images")
    progress.begin("decode", len(units), len(units) - len(missing))
    steps = Steps(
        ReadForDecoding(options.size),
        partial(_Decode, options=replace(options, autoencoder=absolute(options.autoencoder))),
        WriteImages(absolute(out), absolute(journal.directory)),
    )
    for _ in runner.run(missing, steps):
        progress.advance()
    found: dict[str, list[ShardFile]] = {job.name: [] for job in jobs}
    for unit in units:
        found[unit.set_name].append(ShardFile.model_validate(journal.read(unit.number)["shard"]))
    return found


def missing_units(journal: Journal, units: Sequence[ImageUnit], images: Location) -> list[ImageUnit]:
    """Units without a record of their own, or whose tar or index is gone or altered.

    The sets may have changed since the records were written: an alignment that there is now allows another.
    """
    finished = journal.finished()

    def is_there(unit: ImageUnit) -> bool:
        tar = images / unit.set_name / shard_name(unit.shard)
        try:
            record = journal.read(unit.number)
            shard = ShardFile.model_validate(record.get("shard"))
        except (ArtifactError, ValidationError):
            return False
        is_its_own = record.get("set") == unit.set_name and shard.name == tar.name
        index = tar.with_suffix(".parquet")
        return is_its_own and has_sha256(tar, shard.sha256) and has_sha256(index, shard.index_sha256)

    return [unit for unit in units if unit.number not in finished or not is_there(unit)]


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
    """Latents, real images or noise → 8-bit images, rounded before anything measures them."""

    def __init__(self, device: torch.device, *, options: DecoderOptions) -> None:
        self.device, self.options = device, options
        model, manifest = load_autoencoder(options.autoencoder)
        self.model, self.grid = model.to(device), manifest.grid
        self.mean, self.std = torch.from_numpy(options.mean), torch.from_numpy(options.std)

    @torch.inference_mode()
    def _decode(self, latents: Tensor) -> RGBArray:
        """(n,row,column,channel) normalised → (n,H,W,3)."""
        features = (latents * self.std + self.mean).permute(0, 3, 1, 2).to(self.device)
        chunks = features.split(self.options.batch_size)
        return np.concatenate([as_pixels(self.model.decode(chunk)) for chunk in chunks])

    def __call__(self, sources: ImageSources) -> DecodedUnit:
        unit, batch_size = sources.unit, self.options.batch_size
        if sources.pixels is not None:
            return DecodedUnit(unit, reconstruct(self.model, sources.pixels, batch_size, residual=unit.residual))
        if sources.latents is not None:
            return DecodedUnit(unit, self._decode(torch.from_numpy(np.array(sources.latents))))
        noise = initial_noise(self.options.seed, unit.indices, self.grid[0] * self.grid[1], len(self.mean))
        return DecodedUnit(unit, self._decode(noise.reshape(len(noise), *self.grid, -1)))
