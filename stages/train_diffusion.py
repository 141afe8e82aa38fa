"""`svgpipe train-diffusion`: the diffusion transformer, purely from the cache (phase 2).

No image, no backbone and no timm model is loaded; only sample grids, where asked for, load a decoder.

Legend: B batch, T tokens (row-major grid), C channels.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from svgpipe.manifests.cache import FeatureCache
from svgpipe.manifests.checkpoint import (
    EMA,
    RAW,
    STATISTICS_FILE,
    Checkpoint,
    CheckpointStore,
    DiffusionManifest,
    average_name,
    save_tensors,
    weights_file,
)
from svgpipe.manifests.errors import InterruptedRunError, UsageError
from svgpipe.manifests.manifest import WorkDir
from svgpipe.manifests.recipe import DiffusionSection
from svgpipe.manifests.storage import Location, make_directory, write_atomic
from svgpipe.models.averages import new_average, update_averages
from svgpipe.models.dit import DiT
from svgpipe.stages.cache_batches import CacheBatches
from svgpipe.stages.draws import draws_at
from svgpipe.stages.flow_losses import heldout_loss, sample_losses
from svgpipe.stages.guard import DivergenceGuard, clip_gradients, gradient_norms
from svgpipe.stages.images import encode_png, tile
from svgpipe.stages.progress import Progress, Silent
from svgpipe.stages.sampling import SamplerSettings, build_dit, draw_latents
from svgpipe.stages.saver import BackgroundSaver
from svgpipe.stages.training import (
    MetricsLog,
    learning_rate,
    optimizer_tensors,
    pick_device,
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
        try:
            trainer.train()
        finally:
            trainer.saver.close()
        loss = trainer.evaluate()
        if loss is not None:
            trainer.log.write(config.steps, heldout_loss=loss)
        trainer.draw_grid()
        trainer.log.close()
        content = {
            weights_file(name): save_tensors(out / weights_file(name), model.state_dict())
            for name, model in trainer.models.items()
        }
        content[STATISTICS_FILE] = save_tensors(out / STATISTICS_FILE, trainer.statistics)
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
        self.model.recompute = config.activation_checkpointing
        self.averages = [new_average(self.model) for _ in config.ema_decays]
        compiled = self.device.type == "cuda" if config.compile == "auto" else config.compile
        self.velocity = torch.compile(self.model) if compiled else self.model
        scale = cache.store.feature_scale
        self.scale = None if scale is None else torch.from_numpy(scale).to(self.device)
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        folder = self.work.path / "checkpoints"
        self.store = CheckpointStore(folder, config.keep_checkpoints, config.keep_every)
        self.saver = BackgroundSaver(self.store)
        self.guard = DivergenceGuard([name for name, _ in self.model.named_parameters()], self._last_good)
        self.step = self._resume()
        self.log = MetricsLog(self.work.path, self.step)

    @property
    def models(self) -> dict[str, DiT]:
        """The weights as trained and every average of them, by the names that people choose them by."""
        return {RAW: self.model, **dict(zip(map(average_name, self.config.ema_decays), self.averages, strict=True))}

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
        for name, model in self.models.items():
            model.load_state_dict(saved.groups[name])
        restore_optimizer(self.optimizer, saved.groups["optimizer"])
        self.progress.say(f"resumed at step {saved.step}")
        return saved.step

    def _save(self) -> None:
        self.guard.settle()
        groups = {name: model.state_dict() for name, model in self.models.items()}
        groups |= {"optimizer": optimizer_tensors(self.optimizer), "statistics": self.statistics}
        values = {"grid": self.model.grid, "channels": self.model.in_channels, "class_names": self.cache.classes}
        self.log.flush()
        self.saver.save(Checkpoint(self.step, groups, values))

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
        self.guard.settle()
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

    def _train_step(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One update; mean loss and gradient norm, both () on the device: nothing here waits for it."""
        config, step, size = self.config, self.step, len(tokens)
        set_learning_rate(self.optimizer, learning_rate(step, config.steps, config.learning_rate, config.schedule))
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for positions in np.array_split(np.arange(size), config.accumulate):
            part = slice(int(positions[0]), int(positions[-1]) + 1)
            losses = self._losses(tokens[part], labels[part], positions.tolist())
            loss = losses.sum() / size  # so that micro-batches of any size add up to the mean over all
            loss.backward()
            total += loss.detach()
        norms = gradient_norms(self.parameters)
        self.guard.watch(step + 1, total, norms)
        limit = config.clip_grad_norm if config.clip_grad_norm is not None else float("inf")
        norm = clip_gradients(self.parameters, norms, limit)
        self.optimizer.step()
        update_averages(self.averages, config.ema_decays, self.model, step)
        return total, norm

    def _losses(self, tokens: Tensor, labels: Tensor, positions: list[int]) -> Tensor:
        if self.device.type == "cuda":  # copies from pinned memory run beside the computation
            tokens, labels = tokens.pin_memory(), labels.pin_memory()
        x1 = tokens.to(self.device, non_blocking=True).float()
        if self.scale is not None:  # int8 travels to the device, and becomes a feature there
            x1 = x1 * self.scale
        labels = labels.to(self.device, non_blocking=True)
        draws = draws_at(self.config.seed, self.step, positions, x1.shape[1], x1.shape[2], self.device)
        return sample_losses(self.velocity, x1, labels, draws, self.config, null_label=self.model.null_label)

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
        """Mean loss of the first average of the weights on held-out rows, with noise and times that never change."""
        value = heldout_loss(self.averages[0], self.cache, self.config, self.device)
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
        latents = draw_latents(self.averages[0], range(GRID_SAMPLES), settings, self.device).cpu().numpy()
        grid_shape = (len(latents), *self.cache.manifest.feature_shape)
        sheet = tile(self.decode(self.cache.denormalize(latents.reshape(grid_shape))), 8)
        folder = self.work.path / "samples"
        make_directory(folder)
        write_atomic(folder / f"step-{self.step:08d}.png", encode_png(sheet))
        self.log.image(self.step, "samples", sheet)


@dataclass
class _Window:
    """What happened since the last line of the log."""

    started: float = field(default_factory=time.monotonic)
    steps: int = 0
    wait_s: float = 0.0
