"""`svgpipe train-autoencoder`: the residual encoder and the decoder beside the frozen backbone (phase 1)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from svgpipe.manifests.checkpoint import (
    AUTOENCODER_FILE,
    AutoencoderManifest,
    Checkpoint,
    CheckpointStore,
    save_tensors,
)
from svgpipe.manifests.errors import ArtifactError, InterruptedRunError, UsageError
from svgpipe.manifests.manifest import WorkDir
from svgpipe.manifests.recipe import AutoencoderSection, PerceptualSection
from svgpipe.manifests.shards import ShardSet
from svgpipe.manifests.storage import Location, make_directory, write_atomic
from svgpipe.models.autoencoder import Autoencoder
from svgpipe.models.losses import (
    LPIPS,
    BackbonePerceptual,
    GeneratorLoss,
    PatchDiscriminator,
    discriminator_loss,
    generator_loss,
)
from svgpipe.stages.encoder import build_autoencoder, read_weight_file, reconstruct, state_digest
from svgpipe.stages.images import RGBArray, encode_png, psnr, tile
from svgpipe.stages.pixels import as_unit_range
from svgpipe.stages.progress import Progress, Silent
from svgpipe.stages.selection import evenly_spread
from svgpipe.stages.streaming import TrainingImages, load_images, training_batches
from svgpipe.stages.training import (
    MetricsLog,
    autocast,
    generator,
    learning_rate,
    optimizer_tensors,
    pick_device,
    require_finite,
    restore_optimizer,
    seed_of,
    set_learning_rate,
    stop_on_signal,
)

GRID_FOLDER = "reconstructions"
GRID_IMAGES = 16


def train_autoencoder(
    shards: ShardSet, out: Location, config: AutoencoderSection, *, progress: Progress | None = None
) -> AutoencoderManifest:
    """Train on the training split of `shards` and publish the autoencoder at `out`; run again to resume.

    The backbone is frozen and runs without gradients. Loss, residual dropout and alignment: FACTS §5, §7.
    After the last step the alignment scalars are measured over `calibration_images` and frozen.

    Raises:
        UsageError: a config that cannot work. ArtifactError: missing weights or images.
        MismatchError: `out` was begun with another config or other shards.
        DivergedError: a NaN or infinity in the loss. InterruptedRunError: stopped by a signal, state saved.
    """
    progress = progress or Silent()
    model = build_autoencoder(config)
    backbone_weights = state_digest(model.backbone.state_dict())
    with WorkDir(out, AutoencoderManifest, config.model_dump(mode="json"), {"shards": shards.as_input()}) as work:
        if work.finished is not None:
            return work.finished
        trainer = _Trainer(model, shards, work, config, progress)
        trainer.train()
        trainer.freeze_alignment()
        psnr = trainer.evaluate(config.steps)
        trainer.log.close()
        content = save_tensors(out / AUTOENCODER_FILE, model.trained_state())
        grid = out / GRID_FOLDER / f"step-{config.steps:08d}.png"
        return AutoencoderManifest(
            config=work.config,
            inputs=work.inputs,
            seconds=work.seconds,
            steps=config.steps,
            image_size=config.image_size,
            grid=(model.backbone.grid, model.backbone.grid),
            frozen_channels=model.backbone.channels,
            residual_channels=model.channels - model.backbone.channels,
            backbone_weights=backbone_weights,
            alignment=[float(v) for v in model.alignment.scalars] if model.alignment is not None else None,
            content=content,
            heldout_psnr=psnr,
            reconstruction_grid=f"{GRID_FOLDER}/{grid.name}" if grid.exists() else None,
        ).publish(out)


def load_perceptual(config: PerceptualSection, model: Autoencoder) -> BackbonePerceptual | LPIPS | None:
    """The perceptual term that the recipe chose, frozen.

    Raises:
        ArtifactError: LPIPS weights that cannot be had; there is no silent fallback.
    """
    if config.weight == 0:
        return None
    if config.kind == "backbone":
        try:
            return BackbonePerceptual(model.backbone, config.levels)
        except ValueError as error:
            raise UsageError(f"autoencoder.perceptual: {error}") from error
    lpips = LPIPS()
    try:
        lpips.load(
            _weights(config.vgg_weights, "https://download.pytorch.org/models/vgg16-397923af.pth"),
            _weights(
                config.lpips_weights,
                "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth",
            ),
        )
    except ValueError as error:
        raise ArtifactError(f"autoencoder.perceptual: {error}") from error
    return lpips.eval()


def _weights(source: str, url: str) -> dict[str, Tensor]:
    if source != "hub":
        return read_weight_file(Path(source))
    try:
        state: dict[str, Tensor] = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
    except Exception as error:  # urllib's many kinds; all mean that the file cannot be had
        raise ArtifactError(
            f"autoencoder.perceptual: could not download {url} ({error}). Give local files with --set "
            "autoencoder.perceptual.vgg_weights=FILE and .lpips_weights=FILE, or choose "
            "--set autoencoder.perceptual.kind=backbone."
        ) from error
    return state


@dataclass
class _Trainer:
    """State of one run: model, optimisers, where they are saved."""

    model: Autoencoder
    shards: ShardSet
    work: WorkDir[AutoencoderManifest]
    config: AutoencoderSection
    progress: Progress

    def __post_init__(self) -> None:
        config = self.config
        self.device = pick_device()
        self.perceptual = load_perceptual(config.perceptual, self.model)
        torch.manual_seed(seed_of(config.seed, "discriminator"))
        self.discriminator = (
            PatchDiscriminator(width=config.discriminator.width, layers=config.discriminator.layers)
            if config.discriminator.enabled
            else None
        )
        for module in (self.model, self.perceptual, self.discriminator):
            if module is not None:
                module.to(self.device)
        self.trained = [p for n, p in self.model.named_parameters() if not n.startswith("backbone.")]
        self.optimizers = {"generator": _adam(self.trained, config.learning_rate)}
        if self.discriminator is not None:
            self.optimizers["discriminator"] = _adam(list(self.discriminator.parameters()), config.learning_rate)
        self.store = CheckpointStore(self.work.path / "checkpoints")
        self.step = self._resume()
        self.log = MetricsLog(self.work.path, self.step)
        self.heldout = self._load_heldout()

    def _load_heldout(self) -> RGBArray:
        rows = np.flatnonzero(self.shards.rows.heldout & ~self.shards.rows.rejected)
        chosen = [int(rows[i]) for i in evenly_spread(len(rows), self.config.eval_images)]
        if not chosen:
            self.progress.say("no held-out images in these shards: PSNR is not measured (svgpipe shard --holdout)")
        return load_images(self.shards, chosen, self.config.image_size)

    def _resume(self) -> int:
        saved = self.store.latest(self.progress.say)
        if saved is None:
            return 0
        self.model.load_trained_state(saved.groups["model"])
        for name, optimizer in self.optimizers.items():
            restore_optimizer(optimizer, saved.groups[name])
        if self.discriminator is not None:
            self.discriminator.load_state_dict(saved.groups["discriminator_model"])
        self.progress.say(f"resumed at step {saved.step}")
        return saved.step

    def _save(self) -> None:
        groups = {name: optimizer_tensors(optimizer) for name, optimizer in self.optimizers.items()}
        groups["model"] = self.model.trained_state()
        if self.discriminator is not None:
            groups["discriminator_model"] = self.discriminator.state_dict()
        self.log.flush()
        self.store.save(Checkpoint(self.step, groups, {}))

    def train(self) -> None:
        """Steps until `config.steps`, with held-out evaluation and checkpoints on the way."""
        config = self.config
        self.progress.begin("train-autoencoder", config.steps, self.step)
        batches = self._batches()
        started, done = time.monotonic(), 0
        with stop_on_signal() as stop:
            while self.step < config.steps:
                loss, d_loss = self._step(next(batches))
                self.step, done = self.step + 1, done + 1
                note = ""
                if self.step % config.log_every == 0 or self.step == config.steps:
                    rate = done * config.batch_size / (time.monotonic() - started)
                    note = self._record(loss, d_loss, rate)
                    started, done = time.monotonic(), 0
                self.progress.advance(1, note)
                if self.step % config.eval_every == 0 and self.step < config.steps:
                    self.evaluate(self.step)
                if self.step % config.checkpoint_every == 0 or stop.seen:
                    self._save()
                if stop.seen:
                    self.log.close()
                    raise InterruptedRunError(
                        f"{self.work.path}: stopped at step {self.step} of {config.steps}; "
                        "saved. The same command resumes."
                    )

    def _batches(self) -> Iterator[Tensor]:
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
        )
        return training_batches(dataset, config.workers)

    def _step(self, pixels: Tensor) -> tuple[GeneratorLoss, float]:
        config, step = self.config, self.step
        # Dropout draws from the global generator: seeding it by step is what makes a resumed run equal.
        torch.manual_seed(seed_of(config.seed, "step", step))
        draws = torch.rand(len(pixels), generator=generator(config.seed, "mask", step)).to(self.device)
        images = pixels.to(self.device, non_blocking=True).float() / 255
        target = images * 2 - 1
        for optimizer in self.optimizers.values():
            set_learning_rate(optimizer, learning_rate(step, config.steps, config.learning_rate, config.schedule))
        on = self.discriminator is not None and step >= config.discriminator.start_step
        self.model.train()
        with autocast(self.device, config.precision):
            reconstruction = self.model.decode(self.model.encode(images, draws)).float()
            loss = generator_loss(
                target,
                reconstruction,
                perceptual=self.perceptual,
                perceptual_weight=config.perceptual.weight,
                discriminator=self.discriminator,
                last_layer=self.model.decoder.conv_out.weight,
                discriminator_weight=config.discriminator.weight,
                discriminator_on=on,
            )
        self._apply("generator", loss.total)
        if self.discriminator is None or not on:
            return loss, 0.0
        with autocast(self.device, config.precision):
            d_loss = discriminator_loss(self.discriminator, target, reconstruction, config.discriminator.loss)
        self._apply("discriminator", d_loss)
        return loss, d_loss.item()

    def _apply(self, name: str, loss: Tensor) -> None:
        optimizer = self.optimizers[name]
        value = loss.item()
        require_finite({f"{name} loss": value}, self.step + 1, self.store)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        norm = torch.nn.utils.clip_grad_norm_(parameters, float("inf"))
        require_finite({f"{name} gradient norm": norm.item()}, self.step + 1, self.store)
        optimizer.step()

    def _record(self, loss: GeneratorLoss, d_loss: float, rate: float) -> str:
        config = self.config
        self.log.write(
            self.step,
            l1=loss.l1.item(),
            perceptual=loss.perceptual.item(),
            nll=loss.nll.item(),
            adversarial=loss.adversarial.item(),
            adaptive_weight=loss.adaptive_weight.item(),
            discriminator=d_loss,
            learning_rate=learning_rate(self.step - 1, config.steps, config.learning_rate, config.schedule),
            images_per_s=rate,
        )
        return f"L1 {loss.l1.item():.4f}  perceptual {loss.perceptual.item():.4f}  {rate:.0f} images/s"

    @torch.no_grad()
    def evaluate(self, step: int) -> float | None:
        """Mean PSNR (dB, on rounded 8-bit images) over the held-out images, and a grid of the first ones."""
        ready = self.model.alignment is None or bool(self.model.alignment.num_tracked > 0)
        if not len(self.heldout) or not ready:
            return None
        self.model.eval()
        reconstructed = reconstruct(self.model, self.heldout, self.config.batch_size)
        value = float(psnr(self.heldout, reconstructed).mean())
        self.log.write(step, heldout_psnr=value)
        count = min(GRID_IMAGES, len(self.heldout))
        pairs = np.concatenate([self.heldout[:count], reconstructed[:count]])
        folder = self.work.path / GRID_FOLDER
        make_directory(folder)
        sheet = tile(pairs, count)
        write_atomic(folder / f"step-{step:08d}.png", encode_png(sheet))
        self.log.image(step, "reconstructions", sheet)
        self.progress.say(f"step {step}: held-out PSNR {value:.2f} dB")
        return value

    @torch.no_grad()
    def freeze_alignment(self) -> None:
        """Measure the four alignment scalars over evenly spread training images, and freeze them."""
        alignment, residual = self.model.alignment, self.model.residual
        if alignment is None or residual is None:
            return
        rows = np.flatnonzero(~self.shards.rows.heldout & ~self.shards.rows.rejected)
        chosen = [int(rows[i]) for i in evenly_spread(len(rows), self.config.calibration_images)]
        self.model.eval()
        maps: list[tuple[Tensor, Tensor]] = []
        for start in range(0, len(chosen), self.config.batch_size):
            pixels = load_images(self.shards, chosen[start : start + self.config.batch_size], self.config.image_size)
            images = as_unit_range(pixels).to(self.device)
            normalised = (images - self.model.imagenet_mean) / self.model.imagenet_std
            maps.append((_moments(self.model.backbone(images)), _moments(residual(normalised))))
        frozen, encoded = (_scalars(torch.stack(part)) for part in zip(*maps, strict=True))
        alignment.freeze(torch.cat([frozen, encoded]).to(self.device, torch.float32))


def _adam(parameters: list[torch.nn.Parameter], rate: float) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=rate, betas=(0.5, 0.9))


def _moments(features: Tensor) -> Tensor:
    """(B,C,h,w) → (3,C) float64: count, sum and sum of squares per channel."""
    flat = features.double().transpose(0, 1).flatten(1)
    count = torch.full((len(flat),), flat.shape[1], dtype=torch.float64, device=flat.device)
    return torch.stack([count, flat.sum(1), flat.square().sum(1)])


def _scalars(moments: Tensor) -> Tensor:
    """(N,3,C) moments → (2,): per-channel mean and unbiased std over everything, averaged over channels."""
    count, total, squares = moments.sum(0)
    variance = (squares - total.square() / count) / (count - 1)
    return torch.stack([(total / count).mean(), variance.clamp_min(0).sqrt().mean()])
