"""`svgpipe train-diffusion`: the diffusion transformer, purely from the cache (phase 2).

No image, no backbone and no timm model is loaded; only sample grids, where asked for, load a decoder.

Legend: B batch, T tokens (row-major grid), C channels.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from svgpipe.manifests.cache import FeatureCache
from svgpipe.manifests.checkpoint import (
    EMA_FILE,
    RAW_FILE,
    STATISTICS_FILE,
    Checkpoint,
    CheckpointStore,
    DiffusionManifest,
    save_tensors,
)
from svgpipe.manifests.errors import InterruptedRunError, UsageError
from svgpipe.manifests.manifest import WorkDir
from svgpipe.manifests.recipe import DiffusionSection
from svgpipe.manifests.storage import Location, make_directory, write_atomic
from svgpipe.manifests.store import PendingRead
from svgpipe.models.dit import DiT
from svgpipe.models.flow import FlowLoss, drop_labels, flow_loss, shift_time
from svgpipe.stages.batches import Batch, batch_at
from svgpipe.stages.images import encode_png, tile
from svgpipe.stages.progress import Progress, Silent
from svgpipe.stages.sampling import SamplerSettings, build_dit, draw_latents
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
        trainer = _Trainer(cache, work, config, decode, progress)
        trainer.train()
        loss = trainer.evaluate()
        if loss is not None:
            trainer.log.write(config.steps, heldout_loss=loss)
        trainer.draw_grid()
        trainer.log.close()
        statistics = {"channel_mean": cache.channel_mean, "channel_std": cache.channel_std}
        content = {
            EMA_FILE: save_tensors(out / EMA_FILE, trainer.ema.state_dict()),
            RAW_FILE: save_tensors(out / RAW_FILE, trainer.model.state_dict()),
            STATISTICS_FILE: save_tensors(
                out / STATISTICS_FILE, {k: torch.from_numpy(v.copy()) for k, v in statistics.items()}
            ),
        }
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
            num_parameters=sum(p.numel() for p in trainer.model.parameters()),
            heldout_loss=loss,
        ).publish(out)


class CacheBatches:
    """Training batches of a cache, several reads in flight: step → tokens (B,T,C) as stored and labels (B,)."""

    def __init__(self, cache: FeatureCache, rows: NDArray[np.int64], config: DiffusionSection, start: int) -> None:
        """`rows` are the cache rows to train on; `start` is the first step."""
        self.cache, self.rows, self.config = cache, rows, config
        self.num_views = len(cache.views) if config.use_flips else 1
        self.next_step = start
        self.in_flight: deque[tuple[NDArray[np.int64], PendingRead]] = deque()

    def _request(self) -> None:
        config = self.config
        batch: Batch = batch_at(
            self.next_step,
            seed=config.seed,
            batch_size=config.batch_size,
            num_rows=len(self.rows),
            num_views=self.num_views,
        )
        rows = self.rows[batch.rows]
        self.in_flight.append((rows, self.cache.read_async(rows, batch.views)))
        self.next_step += 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            while len(self.in_flight) < self.config.read_ahead:
                self._request()
            rows, pending = self.in_flight.popleft()
            features = pending.stored()
            labels = torch.from_numpy(self.cache.labels[rows].astype(np.int64))
            yield torch.from_numpy(features).flatten(1, 2), labels


@dataclass
class _Trainer:
    """State of one run: model, average, optimiser, where they are saved."""

    cache: FeatureCache
    work: WorkDir[DiffusionManifest]
    config: DiffusionSection
    decode: Decode | None
    progress: Progress

    def __post_init__(self) -> None:
        config, cache = self.config, self.cache
        self.device = pick_device()
        usable = cache.valid & ~cache.heldout
        self.rows = np.flatnonzero(usable)
        if not len(self.rows):
            raise UsageError(f"{cache.path}: expected valid rows to train on, found none that are not held out.")
        if not (cache.valid & cache.heldout).any():
            self.progress.say("no held-out rows in this cache: held-out loss is not measured (svgpipe shard --holdout)")
        rows, columns, channels = cache.manifest.feature_shape
        torch.manual_seed(seed_of(config.seed, "initial weights"))
        self.model = build_dit(
            config.model, grid=(rows, columns), channels=channels, num_classes=len(cache.classes)
        ).to(self.device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        scale = cache.store.feature_scale
        self.scale = None if scale is None else torch.from_numpy(scale).to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.store = CheckpointStore(self.work.path / "checkpoints", config.keep_checkpoints)
        self.step = self._resume()
        self.log = MetricsLog(self.work.path, self.step)

    def _resume(self) -> int:
        saved = self.store.latest(self.progress.say)
        if saved is None:
            return 0
        self.model.load_state_dict(saved.groups["model"])
        self.ema.load_state_dict(saved.groups["ema"])
        restore_optimizer(self.optimizer, saved.groups["optimizer"])
        self.progress.say(f"resumed at step {saved.step}")
        return saved.step

    def _save(self) -> None:
        groups = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": optimizer_tensors(self.optimizer),
        }
        self.log.flush()
        self.store.save(Checkpoint(self.step, groups, {}))

    def train(self) -> None:
        """Steps until `config.steps`, with held-out loss, grids and checkpoints on the way."""
        config = self.config
        self.progress.begin("train-diffusion", config.steps, self.step)
        batches = iter(CacheBatches(self.cache, self.rows, config, self.step))
        window = _Window()
        with stop_on_signal() as stop:
            while self.step < config.steps:
                before = time.monotonic()
                tokens, labels = next(batches)
                window.wait_s += time.monotonic() - before
                loss, norm = self._train_step(tokens, labels)
                self.step += 1
                window.steps += 1
                note = ""
                if self.step % config.log_every == 0 or self.step == config.steps:
                    note = self._record(loss, norm, window)
                    window = _Window()
                self.progress.advance(1, note)
                self._housekeeping(stop.seen)

    def _housekeeping(self, stopping: bool) -> None:
        config, step = self.config, self.step
        if step % config.eval_every == 0 and step < config.steps and (value := self.evaluate()) is not None:
            self.log.write(step, heldout_loss=value)
        if step % config.sample_every == 0 and step < config.steps:
            self.draw_grid()
        if step % config.checkpoint_every == 0 or stopping:
            self._save()
        if stopping and step < config.steps:
            self.log.close()
            raise InterruptedRunError(
                f"{self.work.path}: stopped at step {step} of {config.steps}; saved. The same command resumes."
            )

    def _train_step(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        config, step = self.config, self.step
        set_learning_rate(self.optimizer, learning_rate(step, config.steps, config.learning_rate, config.schedule))
        self.model.train()
        x1 = tokens.to(self.device, non_blocking=True).float()
        if self.scale is not None:  # int8 travels to the device, and becomes a feature there
            x1 = x1 * self.scale
        rng = generator(config.seed, "step", step)
        loss = _draw_loss(self.model, x1, labels, rng, config, drop=config.label_dropout).mean
        require_finite({"loss": loss.item()}, step + 1, self.store)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        limit = config.clip_grad_norm if config.clip_grad_norm is not None else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        require_finite({"gradient norm": norm.item()}, step + 1, self.store)
        self.optimizer.step()
        self._average()
        return loss.detach(), norm

    @torch.no_grad()
    def _average(self) -> None:
        averaged: list[Tensor] = list(self.ema.parameters())
        current: list[Tensor] = list(self.model.parameters())
        torch._foreach_lerp_(averaged, current, 1 - self.config.ema_decay)

    def _record(self, loss: Tensor, norm: Tensor, window: _Window) -> str:
        config = self.config
        seconds = time.monotonic() - window.started
        rate = window.steps / seconds
        self.log.write(
            self.step,
            loss=loss.item(),
            grad_norm=norm.item(),
            learning_rate=learning_rate(self.step - 1, config.steps, config.learning_rate, config.schedule),
            samples_per_s=rate * config.batch_size,
            data_wait_share=window.wait_s / seconds,
        )
        return f"loss {loss.item():.4f}  {rate:.2f} steps/s"

    def evaluate(self) -> float | None:
        """Mean loss of the averaged weights on held-out rows, with noise and times that never change."""
        value = heldout_loss(self.ema, self.cache, self.config, self.device)
        if value is not None:
            self.progress.say(f"step {self.step}: held-out loss {value:.4f}")
        return value

    def draw_grid(self) -> None:
        """A sheet of samples from the averaged weights, where a decoder was given."""
        if self.decode is None:
            return
        config = self.config
        settings = SamplerSettings(
            config.sample_steps, 1.0, "euler", "constant", config.sample_shift, 0, config.precision, "ema"
        )
        latents = draw_latents(self.ema, range(GRID_SAMPLES), settings, self.device).cpu().numpy()
        grid_shape = (len(latents), *self.cache.manifest.feature_shape)
        sheet = tile(self.decode(self.cache.denormalize(latents.reshape(grid_shape))), 8)
        folder = self.work.path / "samples"
        make_directory(folder)
        write_atomic(folder / f"step-{self.step:08d}.png", encode_png(sheet))
        self.log.image(self.step, "samples", sheet)


def _draw_loss(
    model: DiT, x1: Tensor, labels: Tensor, rng: torch.Generator, config: DiffusionSection, *, drop: float
) -> FlowLoss:
    """Noise, times and label dropout are drawn on the CPU from `rng`, the same on every device."""
    count, device = len(x1), x1.device
    z0 = torch.randn(x1.shape, generator=rng).to(device)
    t = shift_time(torch.rand(count, generator=rng), config.time_shift).to(device)
    draws = torch.rand(count, generator=rng)
    if drop > 0:
        labels = drop_labels(labels, draws, drop, model.null_label)
    with autocast(device, config.precision):
        return flow_loss(model, x1, z0, t, labels.to(device))


@torch.no_grad()
def heldout_loss(model: DiT, cache: FeatureCache, config: DiffusionSection, device: torch.device) -> float | None:
    """Mean flow loss on the first `eval_rows` held-out rows, with noise and times that never change.

    None where the cache has no held-out row.
    """
    held = np.flatnonzero(cache.valid & cache.heldout)[: config.eval_rows]
    total, size = 0.0, config.batch_size
    for start in range(0, len(held), size):
        rows = held[start : start + size]
        x1 = torch.from_numpy(cache.read(rows)).flatten(1, 2).to(device).float()
        labels = torch.from_numpy(cache.labels[rows].astype(np.int64))
        rng = generator(config.seed, "heldout", start)
        total += float(_draw_loss(model, x1, labels, rng, config, drop=0.0).per_sample.sum())
    return total / len(held) if len(held) else None


@dataclass
class _Window:
    """What happened since the last line of the log."""

    started: float = field(default_factory=time.monotonic)
    steps: int = 0
    wait_s: float = 0.0
