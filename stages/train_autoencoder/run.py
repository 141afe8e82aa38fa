"""One run of autoencoder training: batches, measurements, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from svgpipe.manifests.autoencoder_section import AutoencoderSection
from svgpipe.manifests.checkpoint import Checkpoint, CheckpointStore, save_tensors
from svgpipe.manifests.errors import UsageError
from svgpipe.manifests.filesystem import Location, make_directory, write_atomic
from svgpipe.manifests.model_manifests import AUTOENCODER_FILE, AutoencoderManifest
from svgpipe.manifests.selection import choose_evenly, evenly_spread
from svgpipe.manifests.shards import ShardSet
from svgpipe.models.autoencoder import Autoencoder
from svgpipe.models.backbone import Backbone
from svgpipe.models.svg_autoencoder import SVGAutoencoder

from ..images.decode import RGBArray, encode_png, psnr, tile
from ..images.stream import ImageBatch, TrainingImages, load_images, training_batches
from ..images.tensors import as_unit_range
from ..networks.autoencoder import build_autoencoder, described, latent_grid, reconstruct
from ..networks.backbone import build_backbone, state_digest
from ..networks.perceptual import load_perceptual
from ..training.distributed import ProcessGroup
from ..training.loop import TrainingRun
from ..training.supervisor import Supervisor
from .trainer import AutoencoderTrainer, Step

GRID_FOLDER = "reconstructions"
GRID_IMAGES = 16
MEMORY_ADVICE = "Use a smaller autoencoder.batch_size, autoencoder.decoder.ch or image, or several --workers."


class Batch(NamedTuple):
    """This process's slice of a batch.

    Attributes:
        pixels: (B,3,S,S) uint8.
        stored: (B,V,h,w) their values in a cache, for a decoder alone.
    """

    pixels: Tensor
    stored: Tensor | None = None


class AutoencoderRun(TrainingRun[Batch, Step, AutoencoderManifest]):
    """The trainer, its batches, and its measurements."""

    section, item = "autoencoder", "image"
    config: AutoencoderSection

    def __init__(
        self,
        group: ProcessGroup,
        supervisor: Supervisor,
        shards: ShardSet,
        out: Location,
        config: AutoencoderSection,
        wandb_project: str | None,
    ) -> None:
        """Open the run; see `train_autoencoder` for arguments and errors."""
        self.shards, self.config = shards, config
        super().__init__(group, supervisor, out, CheckpointStore(out / "checkpoints"))
        self.trainer = self.new_trainer()
        count = int((self.usable & ~shards.rows.heldout).sum())
        epochs = config.steps * config.batch_size / max(1, count)
        supervisor.say(
            f"{config.steps} steps of {config.batch_size} images: {epochs:.3g} epochs of {count} training images"
        )
        self.resume(wandb_project)
        held = np.flatnonzero(shards.rows.heldout & self.usable)
        self.heldout_rows = choose_evenly(held.tolist(), config.eval_images)
        self.heldout = self._load_heldout() if group.is_main else None

    @property
    def usable(self) -> NDArray[np.bool_]:
        """(N,) rows of the shard set that are trained on or measured."""
        return ~self.shards.rows.rejected

    def new_trainer(self) -> AutoencoderTrainer:
        """Return a trainer of a new model."""
        config = self.config
        model = build_autoencoder(config, self.out)
        backbone = _backbone(model, config, self.out)
        self.backbone_weights = "" if backbone is None else state_digest(backbone.state_dict())
        perceptual = load_perceptual(config.perceptual, backbone)
        return AutoencoderTrainer(model, config, self.group, backbone, perceptual, self.last_good)

    def _load_heldout(self) -> RGBArray | None:
        if not self.heldout_rows:
            self.supervisor.say("no held-out images in these shards: PSNR is not measured (svgpipe shard --holdout)")
            return None
        return load_images(self.shards, self.heldout_rows, self.config.image_size)

    def load(self, saved: Checkpoint) -> None:
        self.trainer.load(saved.groups)

    def state(self) -> Checkpoint:
        return Checkpoint(self.step, self.trainer.state(), {})

    def take_step(self, batch: Batch) -> Step:
        return self.trainer(self.step, batch.pixels, batch.stored)

    def settle(self) -> None:
        self.trainer.settle()

    def measure(self) -> None:
        if self.step % self.config.eval_every == 0:
            self.evaluate()

    def batches(self) -> Iterator[Batch]:
        return (Batch(images.pixels) for images in self.images())

    def images(self) -> Iterator[ImageBatch]:
        """Return this process's images of all batches, from `step` on."""
        config = self.config
        dataset = TrainingImages(
            self.shards,
            size=config.image_size,
            batch_size=config.batch_size,
            crop=config.crop,
            flip=config.flip,
            buffer=config.shuffle_buffer,
            seed=config.seed,
            start=self.step,
            local_slice=self.group.local_slice(config.batch_size),
            usable=self.usable,
        )
        return training_batches(dataset, config.workers)

    def logged(self, result: Step) -> tuple[dict[str, float], str]:
        summed = self.group.sum(torch.stack([part.float() for part in result.parts.values()])).tolist()
        weights = {name: weight.item() for name, weight in result.weights.items()}
        values = dict(zip(result.parts, summed, strict=True)) | weights
        return values, f"L1 {values['l1']:.4f}  perceptual {values['perceptual']:.4f}"

    @torch.no_grad()
    def evaluate(self) -> float | None:
        """Return the mean PSNR (dB, 8-bit images) of the held-out images, and write a grid of the first ones."""
        if self.heldout is None or self.log is None:
            return None
        self.trainer.model.eval()
        if (reconstructed := self.reconstructed(self.heldout)) is None:
            return None
        value = float(psnr(self.heldout, reconstructed).mean())
        self.log.write(self.step, heldout_psnr=value)
        count = min(GRID_IMAGES, len(self.heldout))
        pairs = np.concatenate([self.heldout[:count], reconstructed[:count]])
        make_directory(self.out / GRID_FOLDER)
        sheet = tile(pairs, count)
        write_atomic(self._grid_file, encode_png(sheet))
        self.log.image(self.step, "reconstructions", sheet)
        self.supervisor.say(f"step {self.step}: held-out PSNR {value:.2f} dB")
        return value

    def reconstructed(self, heldout: RGBArray) -> RGBArray | None:
        """Return the reconstructions of the held-out images; None if the model cannot encode yet."""
        model = self.trainer.model
        assert isinstance(model, Autoencoder), "overridden for a decoder alone"
        return reconstruct(model, heldout, self.config.batch_size) if model.can_encode else None

    @property
    def _grid_file(self) -> Location:
        return self.out / GRID_FOLDER / f"step-{self.step:08d}.png"

    @torch.no_grad()
    def freeze_alignment(self) -> None:
        """Measure the four alignment scalars of kind svg on evenly spread training images, and freeze them."""
        model, group, config = self.trainer.model, self.group, self.config
        if not isinstance(model, SVGAutoencoder) or model.alignment is None or model.residual is None:
            return
        alignment, residual = model.alignment, model.residual
        rows = np.flatnonzero(~self.shards.rows.heldout & ~self.shards.rows.rejected)
        spread = evenly_spread(len(rows), config.calibration_images)
        chosen = [int(rows[spread[place]]) for place in group.local_slice(len(spread))]
        model.eval()
        frozen = torch.zeros(3, model.backbone.channels, dtype=torch.float64, device=group.device)
        encoded = torch.zeros(3, residual.channels, dtype=torch.float64, device=group.device)
        for start in range(0, len(chosen), config.batch_size):
            pixels = load_images(self.shards, chosen[start : start + config.batch_size], config.image_size)
            images = as_unit_range(pixels).to(group.device)
            frozen += _moments(model.backbone(images))
            encoded += _moments(residual((images - model.imagenet_mean) / model.imagenet_std))
        scalars = [_scalars(group.sum(moments)) for moments in (frozen, encoded)]
        alignment.freeze(torch.cat(scalars).float())

    def finish(self) -> AutoencoderManifest:
        """Freeze the alignment, measure, and write the weights.

        Returns:
            The manifest.
        """
        self.freeze_alignment()
        psnr_db = self.evaluate()
        manifest = AutoencoderManifest(**self.written(), steps=self.config.steps, heldout_psnr=psnr_db)
        sheet = f"{GRID_FOLDER}/{self._grid_file.name}" if self._grid_file.exists() else None
        return manifest.model_copy(update={"reconstruction_grid": sheet})

    def written(self) -> dict[str, Any]:
        """Write the weights, on the main process.

        Returns:
            The fields of the manifest that describe them.
        """
        model, content = self.trainer.model, ""
        assert isinstance(model, Autoencoder), "overridden for a decoder alone"
        if self.log is not None:
            self.log.close()
            self.supervisor.check()
            content = save_tensors(self.out / AUTOENCODER_FILE, model.trained_state())
        return {**described(model, self.config), "backbone_weights": self.backbone_weights, "content": content}


def _backbone(model: Autoencoder, config: AutoencoderSection, out: Location) -> Backbone | None:
    """Return the vision model that the training needs: the encoder's own, or one for a loss.

    Raises:
        UsageError: kind aligned-kl, and its features have another grid than the latents.
    """
    if isinstance(model, SVGAutoencoder):
        return model.backbone
    if not config.trains_with_backbone:
        return None
    backbone = build_backbone(config.backbone, config.image_size, out)
    grid = latent_grid(config, None)
    if config.kind == "aligned-kl" and backbone.grid != grid:
        raise UsageError(
            f"autoencoder.backbone: kind aligned-kl compares every latent with a feature, but the latents have "
            f"{grid}x{grid} places and the features {backbone.grid}x{backbone.grid}. Change decoder.ch_mult, "
            "backbone.input_size or backbone.feature_level."
        )
    return backbone


def _moments(features: Tensor) -> Tensor:
    """Return count, sum and sum of squares per channel: (B,C,h,w) → (3,C)."""
    flat = features.double().transpose(0, 1).flatten(1)
    count = torch.full((len(flat),), flat.shape[1], dtype=torch.float64, device=flat.device)
    return torch.stack([count, flat.sum(1), flat.square().sum(1)])


def _scalars(moments: Tensor) -> Tensor:
    """Return per-channel mean and unbiased std, averaged over channels: (3,C) moments → (2,)."""
    count, total, squares = moments
    variance = (squares - total.square() / count) / (count - 1)
    return torch.stack([(total / count).mean(), variance.clamp_min(0).sqrt().mean()])
