"""One run that fine-tunes the decoder of a finished autoencoder on cached latents. The encoder is not even built."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from svgpipe.manifests.autoencoder_section import AutoencoderSection
from svgpipe.manifests.filesystem import Location
from svgpipe.manifests.shards import ShardSet

from ..images.decode import RGBArray
from ..networks.autoencoder import decode_latents, load_decoder
from ..networks.backbone import build_backbone
from ..networks.perceptual import load_perceptual
from ..runtime.retry import call_with_retries
from ..training.distributed import ProcessGroup
from ..training.supervisor import Supervisor
from .decoder_source import DecoderSource
from .forward import CachedForward
from .run import AutoencoderRun, Batch
from .trainer import AutoencoderTrainer

DECODER_ADVICE = "Use a smaller autoencoder.batch_size, or several --workers."


class DecoderRun(AutoencoderRun):
    """Trains on centre crops, and on what the cache holds of them."""

    def __init__(
        self,
        group: ProcessGroup,
        supervisor: Supervisor,
        shards: ShardSet,
        out: Location,
        config: AutoencoderSection,
        wandb_project: str | None,
        source: DecoderSource,
    ) -> None:
        """Open the run; see `train_autoencoder` for arguments and errors."""
        self.source = source
        supervisor.say(f"encoder: that of {source.path}; crops: centre, as in the cache")
        super().__init__(group, supervisor, shards, out, config, wandb_project)

    @property
    def usable(self) -> NDArray[np.bool_]:
        return self.source.cache.valid & ~self.shards.rows.rejected

    def new_trainer(self) -> AutoencoderTrainer:
        config, group, source = self.config, self.group, self.source
        backbone = None
        if config.perceives_with_backbone:
            beside = source.path if config.encodes_with_backbone else self.out
            backbone = build_backbone(config.backbone, config.image_size, beside)
        model, perceptual = load_decoder(source.path)[0].train(), load_perceptual(config.perceptual, backbone)
        forward = CachedForward(model, source.stored_shape, source.scaling(), config.decoder_noise, group.sum)
        return AutoencoderTrainer(model, config, group, None, perceptual, self.last_good, forward)

    def batches(self) -> Iterator[Batch]:
        """Read images and their latents in a thread, one batch ahead of the step.

        Yields:
            This process's slices.
        """
        images, say = self.images(), self.supervisor.say

        def read() -> Batch:
            chosen = next(images)
            rows, flipped = np.asarray(chosen.rows), np.asarray(chosen.flipped)  # a data loader makes tensors of them
            stored = call_with_retries(partial(self.source.stored, rows, flipped), say)
            return Batch(chosen.pixels, stored)

        reader = ThreadPoolExecutor(1, thread_name_prefix="svgpipe-read")
        try:
            ahead = reader.submit(read)
            while True:
                batch, ahead = ahead.result(), reader.submit(read)
                yield batch
        finally:
            reader.shutdown(cancel_futures=True)

    def reconstructed(self, heldout: RGBArray) -> RGBArray:
        """Return the decoded cached latents of the held-out images; of posteriors the means."""
        del heldout
        cache = self.source.cache
        latents = cache.denormalize(call_with_retries(lambda: cache.read_latents(self.heldout_rows)))
        return decode_latents(self.trainer.model, torch.from_numpy(latents), self.config.batch_size)

    def freeze_alignment(self) -> None:
        """Keep the alignment of the autoencoder."""

    def written(self) -> dict[str, Any]:
        if self.log is None:
            return self.source.described("")
        self.log.close()
        self.supervisor.check()
        return self.source.described(self.source.save(self.trainer.model.trained_state(), self.out))
