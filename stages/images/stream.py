"""Training images from the tars: an endless stream of augmented batches that can start at any batch.

Batch n depends only on (seed, n, batch size), so a resumed run sees the same batches, with any number of training or
decoding processes. The order of references is shuffled; each image is read by the process that decodes it.
"""

from __future__ import annotations

import atexit
import itertools
import os
import random
import signal
import zlib
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
import webdataset as wds
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.index import ImageRef
from svgpipe.manifests.shards import ShardFile, ShardSet, refs_of
from svgpipe.models.seeds import seed_of

from ..runtime.retry import call_with_retries
from .decode import RejectedImageError, RGBArray, centre_crop, decode_image, random_crop, to_array


class ImageBatch(NamedTuple):
    """Augmented images.

    Attributes:
        pixels: (B,3,S,S) uint8.
        rows: (B,) int64, of the shard set.
        flipped: (B,) bool.
    """

    pixels: Tensor
    rows: NDArray[np.int64]
    flipped: NDArray[np.bool_]


class TrainingImages(IterableDataset[ImageBatch]):
    """Endless batches of the training split, from batch `start` on; or some places of each batch."""

    def __init__(
        self,
        shards: ShardSet,
        *,
        size: int,
        batch_size: int,
        crop: Literal["random", "centre"],
        flip: bool,
        buffer: int,
        seed: int,
        start: int,
        local_slice: range | None = None,
        usable: NDArray[np.bool_] | None = None,
    ) -> None:
        """Prepare the stream.

        Args:
            shards: images.
            size: S, pixels per side.
            batch_size: images per batch.
            crop: random or centre.
            flip: whether half of the images are flipped.
            buffer: images in the shuffle buffer.
            seed: of order and augmentation.
            start: number of the first batch.
            local_slice: places of every batch to give; None: all.
            usable: (N,) rows of the shard set to take; None: all that were not rejected when it was made.

        Raises:
            ArtifactError: there are no training images.
        """
        self.usable = ~shards.rows.rejected if usable is None else usable
        counts = np.bincount(shards.rows.shard[self.usable], minlength=len(shards.shards)).tolist()
        self.directory = shards.directory
        self.first_rows = {s.name: int(first) for s, first in zip(shards.shards, shards.starts, strict=False)}
        self.tars = [(s, n) for s, n in zip(shards.shards, counts, strict=True) if s.split == "train" and n]
        if not self.tars:
            raise ArtifactError(f"{shards.directory}: expected training images, found none in its tars.")
        self.size, self.batch_size, self.crop, self.flip = size, batch_size, crop, flip
        self.buffer, self.seed, self.start = buffer, seed, start
        self.local_slice = local_slice if local_slice is not None else range(batch_size)

    def __iter__(self) -> Iterator[ImageBatch]:
        # The loader takes batches from its workers in turn. All workers see the same order and decode their own
        # batches.
        info = get_worker_info()
        mine, workers = (info.id, info.num_workers) if info else (0, 1)
        refs = self._refs(skip=self.start * self.batch_size)
        for turn in itertools.count():
            batch = list(itertools.islice(refs, self.batch_size))
            if turn % workers == mine:
                chosen = [batch[place] for place in self.local_slice]
                images, flipped = zip(*(self._augment(ref, epoch) for _, ref, epoch in chosen), strict=True)
                pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
                yield ImageBatch(pixels, np.asarray([row for row, _, _ in chosen]), np.asarray(flipped))

    def _refs(self, skip: int) -> Iterator[tuple[int, ImageRef, int]]:
        """Yield the row of every image, the image and its epoch, from number `skip` on."""
        per_epoch = sum(n for _, n in self.tars)
        first, rest = divmod(skip, per_epoch)
        for epoch in itertools.count(first):
            yield from itertools.islice(self._epoch(epoch), rest, None)
            rest = 0

    def _epoch(self, epoch: int) -> Iterator[tuple[int, ImageRef, int]]:
        order = [shard for shard, _ in self.tars]
        random.Random(seed_of(self.seed, "shards", epoch)).shuffle(order)
        rng = random.Random(seed_of(self.seed, "buffer", epoch))
        shuffled = wds.shuffle(self.buffer, initial=self.buffer, rng=rng)(self._members(order))
        return ((row, ref, epoch) for row, ref in shuffled)

    def _members(self, tars: Sequence[ShardFile]) -> Iterator[tuple[int, ImageRef]]:
        """Yield rows and images in tar order, by the index: existing tars may hold their members in any order."""
        for shard in tars:
            rows = enumerate(refs_of(self.directory, [shard]), self.first_rows[shard.name])
            yield from ((row, ref) for row, ref in rows if self.usable[row])

    def _augment(self, ref: ImageRef, epoch: int) -> tuple[RGBArray, bool]:
        """Return the cropped image, and whether it is flipped.

        Raises:
            ArtifactError: the image cannot be decoded.
        """
        try:
            image = decode_image(call_with_retries(ref.read), damaged=ref.damaged)
        except RejectedImageError as error:
            raise ArtifactError(
                f"{ref.tar}: image {ref.key}: {error}. Shard the source again, or index its tars with --decode."
            ) from error
        rng = np.random.default_rng([self.seed, epoch, zlib.crc32(ref.key.encode())])
        pixels = to_array(
            random_crop(image, self.size, rng) if self.crop == "random" else centre_crop(image, self.size)
        )
        flipped = bool(self.flip and rng.random() < 0.5)
        return (pixels[:, ::-1] if flipped else pixels), flipped


def training_batches(dataset: TrainingImages, workers: int) -> Iterator[ImageBatch]:
    """Return an iterator over `dataset`, decoding in `workers` additional processes (0: in this one)."""
    if workers == 0:
        return iter(dataset)
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="spawn",
        prefetch_factor=4,
        worker_init_fn=_prepare_worker,
    )
    return _plain_errors(loader)


def _prepare_worker(worker: int) -> None:
    """Ignore Ctrl-C, which reaches the whole process group: the training process needs batches to finish its step.

    Also end without C++ destructors. They abort a process with a running library thread, and the signal of the dead
    worker would raise an error in the training process.
    """
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    atexit.register(os._exit, 0)


def _plain_errors(loader: DataLoader[ImageBatch]) -> Iterator[ImageBatch]:
    try:
        yield from loader
    except (ArtifactError, OSError) as error:  # the loader puts the traceback of the worker into the message
        last = str(error).rstrip().splitlines()[-1]
        raise ArtifactError(last.removeprefix(f"{ArtifactError.__module__}.ArtifactError: ")) from None


def load_images(shards: ShardSet, rows: Sequence[int], size: int) -> RGBArray:
    """Return (N,S,S,3) uint8 ADM centre crops of the given rows."""
    refs = shards.refs(rows)
    crops = [to_array(centre_crop(decode_image(ref.read(), damaged=ref.damaged), size)) for ref in refs]
    return np.stack(crops) if crops else np.zeros((0, size, size, 3), np.uint8)
