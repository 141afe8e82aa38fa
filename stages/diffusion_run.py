"""One run of diffusion training, in each process of its team: batches, steps, checkpoints, and what is watched.

Every process runs the same code on its share of each batch; the one that leads also writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

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
    save_tensors,
    weights_file,
)
from svgpipe.manifests.errors import InterruptedRunError, UsageError
from svgpipe.manifests.recipe import DiffusionSection
from svgpipe.manifests.storage import Location, make_directory, write_atomic
from svgpipe.stages.cache_batches import CacheBatches
from svgpipe.stages.flow_losses import heldout_loss
from svgpipe.stages.flow_trainer import FlowTrainer, Step
from svgpipe.stages.gauges import LossByTime, peak_memory
from svgpipe.stages.images import encode_png, tile
from svgpipe.stages.latent_quality import LatentQuality
from svgpipe.stages.memory_estimate import estimate, require_memory
from svgpipe.stages.metrics_log import MetricsLog
from svgpipe.stages.parallel import Strategy
from svgpipe.stages.sampling import SamplerSettings, draw_latents
from svgpipe.stages.saver import BackgroundSaver, latest_of_all
from svgpipe.stages.supervisor import Supervisor
from svgpipe.stages.team import Team
from svgpipe.stages.training import learning_rate

GRID_SAMPLES = 32
Decode = Callable[[NDArray[np.float32]], NDArray[np.uint8]]
"""Denormalised latents (B,row,column,channel) → (B,H,W,3) uint8."""


@dataclass(frozen=True)
class Trained:
    """What a finished run says of the files that it wrote."""

    content: dict[str, str]
    num_parameters: int
    heldout_loss: float | None


def run_training(
    team: Team,
    supervisor: Supervisor,
    *,
    cache: FeatureCache,
    out: Location,
    config: DiffusionSection,
    decoder: Location | None,
    strategy: Strategy,
    wandb_project: str | None,
) -> Trained:
    """From the last checkpoint in `out` to the finished weights there; see `train_diffusion`."""
    run = DiffusionRun(team, supervisor, cache, out, config, decoder, strategy, wandb_project)
    with closing(run):
        run.train()
        return run.finish()


@dataclass
class DiffusionRun:
    """The trainer, where its batches come from, where it is saved and watched."""

    team: Team
    supervisor: Supervisor
    cache: FeatureCache
    out: Location
    config: DiffusionSection
    decoder: Location | None
    strategy: Strategy
    wandb_project: str | None

    def __post_init__(self) -> None:
        config, cache, team = self.config, self.cache, self.team
        self.rows = np.flatnonzero(cache.valid & ~cache.heldout)
        if not len(self.rows):
            raise UsageError(f"{cache.path}: expected valid rows to train on, found none that are not held out.")
        if config.batch_size < team.size:
            raise UsageError(
                f"diffusion.batch_size: expected at least one sample for each of {team.size} workers, "
                f"found {config.batch_size}. Use fewer --num-workers."
            )
        if config.batch_size > len(self.rows):
            self.supervisor.say(
                f"a batch of {config.batch_size} is more than the {len(self.rows)} rows: some occur twice in it"
            )
        if not (cache.valid & cache.heldout).any():
            self.supervisor.say(
                "no held-out rows in this cache: held-out loss is not measured (svgpipe shard --holdout)"
            )
        self.store = CheckpointStore(self.out / "checkpoints", config.keep_checkpoints, config.keep_every)
        self.saver = BackgroundSaver(self.store, self.supervisor.say)
        rows, columns, channels = cache.manifest.feature_shape
        sizes: dict[str, Any] = {"grid": (rows, columns), "channels": channels, "num_classes": len(cache.classes)}
        require_memory(estimate(config, team, self.strategy, **sizes), team, self.supervisor)
        self.trainer = FlowTrainer(
            config,
            team,
            scale=cache.store.feature_scale,
            last_good=self._last_good,
            strategy=self.strategy,
            **sizes,
        )
        self.decode = self._load_decoder() if team.leads else None
        self.window = _Window(team.device)
        self.step = self._resume()
        self.log = (
            MetricsLog(self.out, self.step, self.wandb_project, ended=self.step >= config.steps) if team.leads else None
        )

    def _load_decoder(self) -> Decode | None:
        if self.decoder is None:
            return None
        from svgpipe.stages.decoding import latent_decoder  # loads timm, which training itself does without

        return latent_decoder(self.decoder)

    @property
    def statistics(self) -> dict[str, Tensor]:
        """What latents are denormalised with."""
        found = {"channel_mean": self.cache.channel_mean, "channel_std": self.cache.channel_std}
        return {name: torch.from_numpy(values.copy()) for name, values in found.items()}

    def _last_good(self) -> Location | None:
        self.saver.wait()
        return self.store.newest

    def _resume(self) -> int:
        saved = latest_of_all(self.store, self.team, self.supervisor.say)
        if saved is None:
            return 0
        self.trainer.load(saved.groups)
        if self.team.leads:
            self.window.by_time.sums.copy_(saved.groups["window"]["loss_by_time"])
        self.supervisor.say(f"resumed at step {saved.step}")
        return saved.step

    def _save(self) -> None:
        groups = {**self.trainer.state(), "statistics": self.statistics}
        # A line of the log may span a resume.
        groups["window"] = {"loss_by_time": self.team.sum(self.window.by_time.sums)}
        if self.log is None:
            return
        grid, channels = self.trainer.model.grid, self.trainer.model.in_channels
        values = {"grid": grid, "channels": channels, "class_names": self.cache.classes}
        self.supervisor.check()
        self.log.flush()
        self.saver.save(Checkpoint(self.step, groups, values))

    def train(self) -> None:
        """Steps until `config.steps`, with held-out loss, grids and checkpoints on the way."""
        config, team = self.config, self.team
        self.supervisor.begin("train-diffusion", config.steps, self.step)
        share = team.share(config.batch_size)
        batches = iter(CacheBatches(self.cache, self.rows, config, self.step, share, self.supervisor.say))
        self.window.begin()
        with self.supervisor.stop_requests() as stop:
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
                    self.window = _Window(team.device)
                self.supervisor.advance(1, note)
                self._housekeeping(team.any(stop.seen))
        self.trainer.guard.settle()
        self.saver.wait()

    def _housekeeping(self, stopping: bool) -> None:
        config, step = self.config, self.step
        if step < config.steps:
            if step % config.eval_every == 0:
                self.evaluate()
            if step % config.sample_every == 0:
                self.draw_grid()
            if step % config.quality_every == 0:
                self.measure_quality()
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

    def _record(self, found: Step) -> str:
        config, window = self.config, self.window
        by_time = window.by_time.summed(self.team)
        if self.log is None:
            return ""
        seconds = time.monotonic() - window.started
        rate = window.steps / seconds
        self.log.write(
            self.step,
            loss=found.loss.item(),
            grad_norm=found.grad_norm.item(),
            learning_rate=learning_rate(self.step - 1, config.steps, config.learning_rate, config.schedule),
            samples_per_s=rate * config.batch_size,
            data_wait_share=window.wait_s / seconds,
            memory_gb=peak_memory(self.team.device) / 1e9,
            **by_time.means(),
        )
        return f"loss {found.loss.item():.4f}  {rate:.2f} steps/s  {rate * config.batch_size:.0f} samples/s"

    def evaluate(self) -> float | None:
        """Mean loss of the first average of the weights on held-out rows, with noise and times that never change."""
        value = heldout_loss(self.trainer.averages[0], self.cache, self.config, self.team, self.supervisor.say)
        if value is not None and self.log is not None:
            self.log.write(self.step, heldout_loss=value)
            self.supervisor.say(f"step {self.step}: held-out loss {value:.4f}")
        return value

    @cached_property
    def quality(self) -> LatentQuality:
        """Reads its part of the cache when it is first asked for."""
        return LatentQuality(self.cache, self.config, self.team, self.supervisor.say)

    def measure_quality(self) -> None:
        """What samples of the first average of the weights are worth in latent space."""
        if not self.config.quality_samples:
            return
        found = self.quality.measure(self.trainer.averages[0])
        if self.log is None or not found:
            return
        self.log.write(self.step, **found)
        words = {"latent_fd": "latent Fréchet distance", "latent_accuracy": "in the right class"}
        told = [f"{words[k]} {found[k]:.3g} (real {found[f'{k}_real']:.3g})" for k in words if f"{k}_real" in found]
        self.supervisor.say(f"step {self.step}: {', '.join(told)}")

    def draw_grid(self) -> None:
        """A sheet of samples from the first average of the weights, where a decoder was given."""
        if self.decoder is None:
            return
        config, team = self.config, self.team
        settings = SamplerSettings(
            config.sample_steps, 1.0, "euler", "constant", config.sample_shift, 0, config.precision, EMA
        )
        # A sharded model runs on all processes at once or not at all, so each draws as many; the last ones may repeat.
        mine = [i % GRID_SAMPLES for i in _padded(team, GRID_SAMPLES)]
        drawn = draw_latents(self.trainer.averages[0], mine, settings, team.device)
        latents = team.rows(drawn[: len(team.share(GRID_SAMPLES))], GRID_SAMPLES)
        if self.log is None or self.decode is None:
            return
        shape = (GRID_SAMPLES, *self.cache.manifest.feature_shape)
        features = self.cache.denormalize(latents.cpu().numpy().reshape(shape))
        sheet = tile(self.decode(features), 8)
        folder = self.out / "samples"
        make_directory(folder)
        write_atomic(folder / f"step-{self.step:08d}.png", encode_png(sheet))
        self.log.image(self.step, "samples", sheet)

    def close(self) -> None:
        """Let go of files and threads, also after an error, which a second one must not hide."""
        self.saver.close()
        if self.log is not None:
            with suppress(Exception):
                self.log.close()

    def finish(self) -> Trained:
        """The last measurements, and all weights as files of their own."""
        loss = self.evaluate()
        self.draw_grid()
        self.measure_quality()
        weights = self.trainer.weights()
        content = {}
        if self.log is not None:
            self.log.close()
            self.supervisor.check()
            content = {
                weights_file(name): save_tensors(self.out / weights_file(name), state)
                for name, state in weights.items()
            }
            content[STATISTICS_FILE] = save_tensors(self.out / STATISTICS_FILE, self.statistics)
        return Trained(content, sum(p.numel() for p in self.trainer.parameters), loss)


def _padded(team: Team, count: int) -> range:
    """This process's share of `count`, made as long as the largest."""
    start = team.share(count).start
    return range(start, start + team.largest_share(count))


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
