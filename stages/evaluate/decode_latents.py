"""Decodes latents, real images and noise to 8-bit images in WebDataset tars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.filesystem import Location, absolute, children, make_directory
from svgpipe.manifests.index import ImageRef, read_index, refs_of_table
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.report_file import evaluate_again
from svgpipe.manifests.shards import ShardFile

from ..images.decode import RGBArray, decode_image
from ..images.image_set import ImageSet
from ..networks.autoencoder import decode_latents, load_autoencoder, reconstruct
from ..networks.sampling import initial_noise
from ..runtime.progress import Progress
from ..runtime.runner import Runner, Steps
from .cpu_tasks import DECODE_JOURNAL, DecodedUnit, ImageSources, ImageUnit, ReadForDecoding, WriteImages


@dataclass(frozen=True)
class ImageJob:
    """One set of images to make, from stored latents, from real images, or, without either, from noise.

    Attributes:
        labels: of the latents; real images have their own, noise has label 0.
        residual: real images: False encodes them without the residual branch.
        noise: real images: deviation of Gaussian noise on their latents, in deviations of the channel.
    """

    name: str
    count: int
    store: Location | None = None
    labels: Sequence[int] = ()
    originals: Sequence[ImageRef] = ()
    residual: bool = True
    noise: float = 0.0

    def units(self, rows: int) -> list[ImageUnit]:
        """Return tars of `rows` images."""
        labels = self.labels or [ref.label for ref in self.originals] or [0] * self.count
        originals = [replace(ref, tar=absolute(ref.tar)) for ref in self.originals]
        return [
            ImageUnit(
                set_name=self.name,
                shard=shard,
                indices=range(first, min(first + rows, self.count)),
                labels=[int(label) for label in labels[first : min(first + rows, self.count)]],
                store=None if self.store is None else absolute(self.store),
                originals=originals[first : first + rows],
                residual=self.residual,
                noise=self.noise,
            )
            for shard, first in enumerate(range(0, self.count, rows))
        ]


@dataclass(frozen=True)
class DecoderOptions:
    """Settings of the decoder.

    Attributes:
        mean: (C,) what normalised latents were centred by.
        std: (C,) what they were divided by; of real images, the unit of the noise on their latents.
        size: pixels per side of the images.
        seed: of the noise.
        unit_rows: images per tar, the unit of resume.
        batch_size: changes images by rounding only.
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
    """Write the tars of every set below `out`/images; run again to resume.

    Returns:
        The tars by name of the set.
    """
    units: list[ImageUnit] = []
    for job in jobs:
        units += job.units(options.unit_rows)
        make_directory(out / "images" / job.name)
    journal = Journal(out, DECODE_JOURNAL)
    # Hashes are checked, because an altered image would be measured as if it were a sample.
    wanted = {unit.name: unit for unit in units}
    missing = [wanted[name] for name in journal.missing(list(wanted), deep=True)]
    progress.begin("decode", len(units), "tars", len(units) - len(missing))
    steps = Steps(
        ReadForDecoding(options.size),
        partial(_Decode, options=replace(options, autoencoder=absolute(options.autoencoder))),
        WriteImages(absolute(out)),
    )
    for _ in runner.run(missing, steps):
        progress.advance()
    tars: dict[str, list[ShardFile]] = {job.name: [] for job in jobs}
    for unit in units:
        tars[unit.set_name].append(ShardFile.model_validate(journal.read(unit.name)["shard"]))
    return tars


def decoded_images(evaluation: Location, name: str) -> ImageSet:
    """Return one set of images of a finished evaluation, in order, from the indexes of its tars.

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
    """Decodes latents, real images or noise to 8-bit images. All metrics use the rounded images."""

    def __init__(self, device: torch.device, *, options: DecoderOptions) -> None:
        self.device, self.options = device, options
        model, manifest = load_autoencoder(options.autoencoder)
        self.model, self.grid = model.to(device), manifest.grid
        self.mean, self.std = torch.from_numpy(options.mean), torch.from_numpy(options.std)

    def _decode(self, latents: Tensor) -> RGBArray:
        """(n,row,column,channel) normalised → (n,H,W,3).

        Returns:
            The images.
        """
        return decode_latents(self.model, latents * self.std + self.mean, self.options.batch_size)

    def __call__(self, sources: ImageSources) -> DecodedUnit:
        unit, batch_size = sources.unit, self.options.batch_size
        if sources.pixels is not None:
            noise = self._noise(unit.indices) * self.std * unit.noise if unit.noise else None
            images = reconstruct(self.model, sources.pixels, batch_size, residual=unit.residual, noise=noise)
            return DecodedUnit(unit, images)
        if sources.latents is not None:
            return DecodedUnit(unit, self._decode(torch.from_numpy(np.array(sources.latents))))
        return DecodedUnit(unit, self._decode(self._noise(unit.indices)))

    def _noise(self, indices: Sequence[int]) -> Tensor:
        """Return standard normal values (n,row,column,channel), a function of seed and index."""
        noise = initial_noise(self.options.seed, indices, self.grid[0] * self.grid[1], len(self.mean))
        return noise.reshape(len(noise), *self.grid, -1)
