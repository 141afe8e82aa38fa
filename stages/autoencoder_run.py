"""One run of autoencoder training, in each process of its team: images, steps, checkpoints, and what is watched.

Every process runs the same code on its share of each batch; the one that leads also measures and writes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from svgpipe.manifests.checkpoint import AUTOENCODER_FILE, Checkpoint, CheckpointStore, save_tensors
from svgpipe.manifests.errors import InterruptedRunError, UsageError
from svgpipe.manifests.recipe import AutoencoderSection
from svgpipe.manifests.shards import ShardSet
from svgpipe.manifests.storage import Location, make_directory, write_atomic
from svgpipe.stages.autoencoder_trainer import AutoencoderTrainer, Step
from svgpipe.stages.encoder import build_autoencoder, reconstruct, state_digest
from svgpipe.stages.gauges import peak_memory
from svgpipe.stages.images import RGBArray, encode_png, psnr, tile
from svgpipe.stages.metrics_log import MetricsLog
from svgpipe.stages.perceptual import load_perceptual
from svgpipe.stages.pixels import as_unit_range
from svgpipe.stages.saver import BackgroundSaver, latest_of_all
from svgpipe.stages.selection import evenly_spread
from svgpipe.stages.streaming import TrainingImages, load_images, training_batches
from svgpipe.stages.supervisor import Supervisor
from svgpipe.stages.team import Team
from svgpipe.stages.training import learning_rate

GRID_FOLDER = "reconstructions"
GRID_IMAGES = 16


@dataclass(frozen=True)
class Trained:
    """What a finished run says of the model and of the files that it wrote."""

    grid: int
    frozen_channels: int
    residual_channels: int
    backbone_weights: str
    alignment: list[float] | None
    content: str
    heldout_psnr: float | None
    reconstruction_grid: str | None


def run_training(
    team: Team,
    supervisor: Supervisor,
    *,
    shards: ShardSet,
    out: Location,
    config: AutoencoderSection,
    wandb_project: str | None,
) -> Trained:
    """From the last checkpoint in `out` to the finished weights there; see `train_autoencoder`."""
    run = AutoencoderRun(team, supervisor, shards, out, config, wandb_project)
    with closing(run):
        run.train()
        return run.finish()


@dataclass
class AutoencoderRun:
    """The trainer, where its images come from, where it is saved and watched."""

    team: Team
    supervisor: Supervisor
    shards: ShardSet
    out: Location
    config: AutoencoderSection
    wandb_project: str | None

    def __post_init__(self) -> None:
        config, team = self.config, self.team
        if config.batch_size < team.size:
            raise UsageError(
                f"autoencoder.batch_size: expected at least one image for each of {team.size} workers, "
                f"found {config.batch_size}. Use fewer --num-workers."
            )
        model = build_autoencoder(config)
        self.backbone_weights = state_digest(model.backbone.state_dict())
        self.store = CheckpointStore(self.out / "checkpoints")
        self.saver = BackgroundSaver(self.store, self.supervisor.say)
        perceptual = load_perceptual(config.perceptual, model)
        self.trainer = AutoencoderTrainer(model, config, team, perceptual, self._last_good)
        self.step = self._resume()
        self.log = (
            MetricsLog(self.out, self.step, self.wandb_project, ended=self.step >= config.steps) if team.leads else None
        )
        self.heldout = self._load_heldout() if team.leads else None

    def _load_heldout(self) -> RGBArray | None:
        rows = np.flatnonzero(self.shards.rows.heldout & ~self.shards.rows.rejected)
        chosen = [int(rows[i]) for i in evenly_spread(len(rows), self.config.eval_images)]
        if not chosen:
            self.supervisor.say("no held-out images in these shards: PSNR is not measured (svgpipe shard --holdout)")
            return None
        return load_images(self.shards, chosen, self.config.image_size)

    def _last_good(self) -> Location | None:
        self.saver.wait()
        return self.store.newest

    def _resume(self) -> int:
        saved = latest_of_all(self.store, self.team, self.supervisor.say)
        if saved is None:
            return 0
        self.trainer.load(saved.groups)
        self.supervisor.say(f"resumed at step {saved.step}")
        return saved.step

    def _save(self) -> None:
        groups = self.trainer.state()
        if self.log is None:
            return
        self.supervisor.check()
        self.log.flush()
        self.saver.save(Checkpoint(self.step, groups, {}))

    def train(self) -> None:
        """Steps until `config.steps`, with held-out evaluation and checkpoints on the way."""
        config, team = self.config, self.team
        self.supervisor.begin("train-autoencoder", config.steps, self.step)
        batches = self._batches()
        started, done, wait_s = time.monotonic(), 0, 0.0
        with self.supervisor.stop_requests() as stop:
            while self.step < config.steps:
                before = time.monotonic()
                pixels = next(batches)
                wait_s += time.monotonic() - before
                found = self.trainer(self.step, pixels)
                self.step, done = self.step + 1, done + 1
                note = ""
                if self.step % config.log_every == 0 or self.step == config.steps:
                    note = self._record(found, done, time.monotonic() - started, wait_s)
                    started, done, wait_s = time.monotonic(), 0, 0.0
                self.supervisor.advance(1, note)
                self._housekeeping(team.any(stop.seen))
        self.trainer.settle()
        self.saver.wait()

    def _housekeeping(self, stopping: bool) -> None:
        config, step = self.config, self.step
        if step % config.eval_every == 0 and step < config.steps:
            self.evaluate()
        self.saver.check()
        if step % config.checkpoint_every == 0 or stopping:
            self._save()
        if stopping and step < config.steps:
            self.saver.wait()
            if self.log is not None:
                self.log.close()
            self.team.wait_for_all()  # the first to leave ends the others
            raise InterruptedRunError(
                f"{self.out}: stopped at step {step} of {config.steps}; saved. The same command resumes."
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
            share=self.team.share(config.batch_size),
        )
        return training_batches(dataset, config.workers)

    def _record(self, found: Step, steps: int, seconds: float, wait_s: float) -> str:
        config, loss = self.config, found.generator
        parts = [loss.l1, loss.perceptual, loss.nll, loss.adversarial, found.discriminator]
        l1, perceptual, nll, adversarial, judged = self.team.sum(torch.stack([p.float() for p in parts])).tolist()
        if self.log is None:
            return ""
        rate = steps / seconds
        self.log.write(
            self.step,
            l1=l1,
            perceptual=perceptual,
            nll=nll,
            adversarial=adversarial,
            adaptive_weight=loss.adaptive_weight.item(),
            discriminator=judged,
            learning_rate=learning_rate(self.step - 1, config.steps, config.learning_rate, config.schedule),
            images_per_s=rate * config.batch_size,
            data_wait_share=wait_s / seconds,
            memory_gb=peak_memory(self.team.device) / 1e9,
        )
        return f"L1 {l1:.4f}  perceptual {perceptual:.4f}  {rate * config.batch_size:.0f} images/s"

    @torch.no_grad()
    def evaluate(self) -> float | None:
        """Mean PSNR (dB, on rounded 8-bit images) over the held-out images, and a grid of the first ones."""
        model = self.trainer.model
        ready = model.alignment is None or bool(model.alignment.num_tracked > 0)
        if self.heldout is None or self.log is None or not ready:
            return None
        model.eval()
        reconstructed = reconstruct(model, self.heldout, self.config.batch_size)
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

    @property
    def _grid_file(self) -> Location:
        return self.out / GRID_FOLDER / f"step-{self.step:08d}.png"

    @torch.no_grad()
    def freeze_alignment(self) -> None:
        """Measure the four alignment scalars over evenly spread training images, and freeze them."""
        model, team, config = self.trainer.model, self.team, self.config
        alignment, residual = model.alignment, model.residual
        if alignment is None or residual is None:
            return
        rows = np.flatnonzero(~self.shards.rows.heldout & ~self.shards.rows.rejected)
        spread = evenly_spread(len(rows), config.calibration_images)
        chosen = [int(rows[spread[place]]) for place in team.share(len(spread))]
        model.eval()
        frozen = torch.zeros(3, model.backbone.channels, dtype=torch.float64, device=team.device)
        encoded = torch.zeros(3, residual.channels, dtype=torch.float64, device=team.device)
        for start in range(0, len(chosen), config.batch_size):
            pixels = load_images(self.shards, chosen[start : start + config.batch_size], config.image_size)
            images = as_unit_range(pixels).to(team.device)
            frozen += _moments(model.backbone(images))
            encoded += _moments(residual((images - model.imagenet_mean) / model.imagenet_std))
        scalars = [_scalars(team.sum(moments)) for moments in (frozen, encoded)]
        alignment.freeze(torch.cat(scalars).float())

    def close(self) -> None:
        """Let go of files and threads, also after an error, which a second one must not hide."""
        self.saver.close()
        if self.log is not None:
            with suppress(Exception):
                self.log.close()

    def finish(self) -> Trained:
        """Freeze the alignment, measure, and write the weights as a file of their own."""
        self.freeze_alignment()
        psnr_db = self.evaluate()
        model, content, grid = self.trainer.model, "", None
        if self.log is not None:
            self.log.close()
            self.supervisor.check()
            content = save_tensors(self.out / AUTOENCODER_FILE, model.trained_state())
            grid = f"{GRID_FOLDER}/{self._grid_file.name}" if self._grid_file.exists() else None
        return Trained(
            grid=model.backbone.grid,
            frozen_channels=model.backbone.channels,
            residual_channels=model.channels - model.backbone.channels,
            backbone_weights=self.backbone_weights,
            alignment=None if model.alignment is None else [float(v) for v in model.alignment.scalars],
            content=content,
            heldout_psnr=psnr_db,
            reconstruction_grid=grid,
        )


def _moments(features: Tensor) -> Tensor:
    """(B,C,h,w) → (3,C) float64: count, sum and sum of squares per channel."""
    flat = features.double().transpose(0, 1).flatten(1)
    count = torch.full((len(flat),), flat.shape[1], dtype=torch.float64, device=flat.device)
    return torch.stack([count, flat.sum(1), flat.square().sum(1)])


def _scalars(moments: Tensor) -> Tensor:
    """(3,C) moments → (2,): per-channel mean and unbiased std over everything, averaged over channels."""
    count, total, squares = moments
    variance = (squares - total.square() / count) / (count - 1)
    return torch.stack([(total / count).mean(), variance.clamp_min(0).sqrt().mean()])
