"""`svgpipe train-diffusion`: the diffusion transformer, purely from the cache (phase 2).

No image, no backbone and no timm model is loaded; only sample grids, where asked for, load a decoder.

Legend: B batch, T tokens (row-major grid), C channels.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from svgpipe.manifests.cache import FeatureCache
from svgpipe.manifests.checkpoint import (
    EMA,
    STATISTICS_FILE,
    Checkpoint,
    CheckpointStore,
    DiffusionManifest,
    save_tensors,
    weights_file,
)
from svgpipe.manifests.errors import InterruptedRunError, UsageError
from svgpipe.manifests.manifest import WorkDir
from svgpipe.manifests.recipe import DiffusionSection
from svgpipe.manifests.storage import Location, make_directory, write_atomic
from svgpipe.stages.cache_batches import CacheBatches
from svgpipe.stages.flow_losses import heldout_loss
from svgpipe.stages.flow_trainer import FlowTrainer, Step
from svgpipe.stages.gauges import LossByTime, peak_memory
from svgpipe.stages.images import encode_png, tile
from svgpipe.stages.progress import Progress, Silent
from svgpipe.stages.sampling import SamplerSettings, draw_latents
from svgpipe.stages.saver import BackgroundSaver
from svgpipe.stages.training import (
    MetricsLog,
    learning_rate,
    pick_device,
    stop_on_signal,
)

GRID_SAMPLES = 32
Decode = Callable[[NDArray[np.float32]], NDArray[np.uint8]]
"""Denormalised latents (B,row,column,channel) → (B,H,W,3) uint8."""


def train_diffusion(
    cache: FeatureCache,
    out: Location,
    config: DiffusionSection,
    *,
    decode: Decode | None = None,
    progress: Progress | None = None,
) -> DiffusionManifest:
    """Train on the valid, not held-out rows of `cache` and publish the model at `out`; run again to resume.

    Args:
        cache: finished feature cache; nothing else is read.
        out: directory to create or resume.
        config: section `diffusion` of a recipe.
        decode: for sample grids while training; without it there are none.
    Raises:
        UsageError: fewer training rows than one, or a model that does not fit the features.
        MismatchError: `out` was begun with another cache or config.
        DivergedError: a NaN or infinity. InterruptedRunError: stopped by a signal, state saved.
    """
    progress = progress or Silent()
    inputs = {"cache": cache.manifest.as_input(cache.path)}
    with WorkDir(out, DiffusionManifest, config.model_dump(mode="json"), inputs) as work:
        if work.finished is not None:
            return work.finished
        run = _Run(cache, work, config, decode, progress)
        try:
            run.train()
        finally:
            run.saver.close()
        loss = run.evaluate()
        if loss is not None:
            run.log.write(config.steps, heldout_loss=loss)
        run.draw_grid()
        run.log.close()
        content = {
            weights_file(name): save_tensors(out / weights_file(name), model.state_dict())
            for name, model in run.trainer.models.items()
        }
        content[STATISTICS_FILE] = save_tensors(out / STATISTICS_FILE, run.statistics)
        rows, columns, channels = cache.manifest.feature_shape
        return DiffusionManifest(
            config=work.config,
            inputs=work.inputs,
            seconds=work.seconds,
            steps=config.steps,
            grid=(rows, columns),
            channels=channels,
            class_names=cache.classes,
            content=content,
            num_parameters=sum(p.numel() for p in run.trainer.parameters),
            heldout_loss=loss,
        ).publish(out)


@dataclass
class _Run:
    """One run: the trainer, where its batches come from, where it is saved and watched."""

    cache: FeatureCache
    work: WorkDir[DiffusionManifest]
    config: DiffusionSection
    decode: Decode | None
    progress: Progress

    def __post_init__(self) -> None:
        config, cache = self.config, self.cache
        self.device = pick_device()
        self.rows = np.flatnonzero(cache.valid & ~cache.heldout)
        if not len(self.rows):
            raise UsageError(f"{cache.path}: expected valid rows to train on, found none that are not held out.")
        if not (cache.valid & cache.heldout).any():
            self.progress.say("no held-out rows in this cache: held-out loss is not measured (svgpipe shard --holdout)")
        self.store = CheckpointStore(self.work.path / "checkpoints", config.keep_checkpoints, config.keep_every)
        self.saver = BackgroundSaver(self.store)
        rows, columns, channels = cache.manifest.feature_shape
        self.trainer = FlowTrainer(
            config,
            self.device,
            grid=(rows, columns),
            channels=channels,
            num_classes=len(cache.classes),
            scale=cache.store.feature_scale,
            last_good=self._last_good,
        )
        self.window = _Window(self.device)
        self.step = self._resume()
        self.log = MetricsLog(self.work.path, self.step)

    @property
    def statistics(self) -> dict[str, Tensor]:
        """What latents are denormalised with."""
        found = {"channel_mean": self.cache.channel_mean, "channel_std": self.cache.channel_std}
        return {name: torch.from_numpy(values.copy()) for name, values in found.items()}

    def _last_good(self) -> Location | None:
        self.saver.wait()
        return self.store.newest

    def _resume(self) -> int:
        saved = self.store.latest(self.progress.say)
        if saved is None:
            return 0
        self.trainer.load(saved.groups)
        self.window.by_time.sums.copy_(saved.groups["window"]["loss_by_time"])
        self.progress.say(f"resumed at step {saved.step}")
        return saved.step

    def _save(self) -> None:
        groups = {**self.trainer.state(), "statistics": self.statistics}
        groups["window"] = {"loss_by_time": self.window.by_time.sums}  # a line of the log may span a resume
        grid, channels = self.trainer.model.grid, self.trainer.model.in_channels
        values = {"grid": grid, "channels": channels, "class_names": self.cache.classes}
        self.log.flush()
        self.saver.save(Checkpoint(self.step, groups, values))

    def train(self) -> None:
        """Steps until `config.steps`, with held-out loss, grids and checkpoints on the way."""
        config = self.config
        self.progress.begin("train-diffusion", config.steps, self.step)
        batches = iter(CacheBatches(self.cache, self.rows, config, self.step))
        self.window.begin()
        with stop_on_signal() as stop:
            while self.step < config.steps:
                before = time.monotonic()
                tokens, labels = next(batches)
                self.window.wait_s += time.monotonic() - before
                found = self.trainer(self.step, tokens, labels)
                self.step += 1
                self.window.add(found)
                note = ""
                if self.step % config.log_every == 0 or self.step == config.steps:
                    note = self._record(found)
                    self.window = _Window(self.device)
                self.progress.advance(1, note)
                self._housekeeping(stop.seen)
        self.trainer.guard.settle()
        self.saver.wait()

    def _housekeeping(self, stopping: bool) -> None:
        config, step = self.config, self.step
        if step % config.eval_every == 0 and step < config.steps and (value := self.evaluate()) is not None:
            self.log.write(step, heldout_loss=value)
        if step % config.sample_every == 0 and step < config.steps:
            self.draw_grid()
        self.saver.check()
        if step % config.checkpoint_every == 0 or stopping:
            self._save()
        if stopping and step < config.steps:
            self.saver.wait()
            self.log.close()
            raise InterruptedRunError(
                f"{self.work.path}: stopped at step {step} of {config.steps}; saved. The same command resumes."
            )

    def _record(self, found: Step) -> str:
        config, window = self.config, self.window
        seconds = time.monotonic() - window.started
        rate = window.steps / seconds
        self.log.write(
            self.step,
            loss=found.loss.item(),
            grad_norm=found.grad_norm.item(),
            learning_rate=learning_rate(self.step - 1, config.steps, config.learning_rate, config.schedule),
            samples_per_s=rate * config.batch_size,
            data_wait_share=window.wait_s / seconds,
            memory_gb=peak_memory(self.device) / 1e9,
            **window.by_time.means(),
        )
        return f"loss {found.loss.item():.4f}  {rate:.2f} steps/s"

    def evaluate(self) -> float | None:
        """Mean loss of the first average of the weights on held-out rows, with noise and times that never change."""
        value = heldout_loss(self.trainer.averages[0], self.cache, self.config, self.device)
        if value is not None:
            self.progress.say(f"step {self.step}: held-out loss {value:.4f}")
        return value

    def draw_grid(self) -> None:
        """A sheet of samples from the first average of the weights, where a decoder was given."""
        if self.decode is None:
            return
        config = self.config
        settings = SamplerSettings(
            config.sample_steps, 1.0, "euler", "constant", config.sample_shift, 0, config.precision, EMA
        )
        latents = draw_latents(self.trainer.averages[0], range(GRID_SAMPLES), settings, self.device).cpu().numpy()
        grid_shape = (len(latents), *self.cache.manifest.feature_shape)
        sheet = tile(self.decode(self.cache.denormalize(latents.reshape(grid_shape))), 8)
        folder = self.work.path / "samples"
        make_directory(folder)
        write_atomic(folder / f"step-{self.step:08d}.png", encode_png(sheet))
        self.log.image(self.step, "samples", sheet)


class _Window:
    """What happened since the last line of the log."""

    def __init__(self, device: torch.device) -> None:
        self.begin()
        self.by_time = LossByTime(device)

    def begin(self) -> None:
        """Start the clock."""
        self.started, self.steps, self.wait_s = time.monotonic(), 0, 0.0

    def add(self, step: Step) -> None:
        self.steps += 1
        self.by_time.add(step.sample_losses, step.times)
