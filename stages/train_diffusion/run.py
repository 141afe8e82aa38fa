"""One run of diffusion training: batches, measurements, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from svgpipe.manifests.cache import FeatureCache
from svgpipe.manifests.checkpoint import Checkpoint, CheckpointStore, save_tensors
from svgpipe.manifests.diffusion_section import DiffusionSection
from svgpipe.manifests.errors import UsageError
from svgpipe.manifests.filesystem import Location, make_directory, write_atomic
from svgpipe.manifests.local_copy import LocalCopy, LocalDisk
from svgpipe.manifests.model_manifests import STATISTICS_FILE, DiffusionManifest, weights_file

from ..images.decode import encode_png, tile
from ..networks.diffusion import width_warning
from ..networks.sampling import shift_told
from ..training.distributed import ProcessGroup, Strategy
from ..training.loop import TrainingRun
from ..training.supervisor import Supervisor
from .alignment_target import AlignmentTarget
from .data import CacheBatch, CacheBatches, blocks_of
from .latent_quality import LatentQuality, sample_in_training, settings_in_training
from .loss import LossByTime, heldout_loss
from .order import pairs_in_one_file
from .snapshots import Snapshots
from .trainer import FlowTrainer, Step

GRID_SAMPLES = 32
MEMORY_ADVICE = (
    "Use --set diffusion.activation_checkpointing=true, a larger diffusion.accumulate, a smaller diffusion.batch_size "
    "or model, several --workers, or --strategy fsdp2."
)
Decode = Callable[[NDArray[np.float32]], NDArray[np.uint8]]
"""Denormalised latents (B,row,column,channel) → (B,H,W,3) uint8."""


class DiffusionRun(TrainingRun[CacheBatch, Step, DiffusionManifest]):
    """The trainer, its batches, and its measurements."""

    section, item = "diffusion", "sample"
    config: DiffusionSection

    def __init__(
        self,
        group: ProcessGroup,
        supervisor: Supervisor,
        cache: FeatureCache,
        out: Location,
        config: DiffusionSection,
        decoder: Location | None,
        strategy: Strategy,
        wandb_project: str | None,
        disk: LocalDisk | None = None,
        target: AlignmentTarget | None = None,
    ) -> None:
        """Open the run; see `train_diffusion` for arguments and errors."""
        self.cache, self.config, self.decoder, self.target = cache, config, decoder, target
        super().__init__(
            group, supervisor, out, CheckpointStore(out / "checkpoints", config.keep_checkpoints, config.keep_every)
        )
        self.rows = self._training_rows()
        rows, columns, channels = cache.manifest.latent_shape
        sizes: dict[str, Any] = {"grid": (rows, columns), "channels": channels, "num_classes": len(cache.classes)}
        options: dict[str, Any] = {"last_good": self.last_good, "strategy": strategy, "target": target}
        self.trainer = FlowTrainer(config, group, scale=cache.store.feature_scale, **options, **sizes)
        size, epochs = self._num_parameters / 1e6, config.steps * config.batch_size / len(self.rows)
        supervisor.say(
            f"{size:.1f} M parameters; {config.steps} steps of {config.batch_size} rows: {epochs:.3g} epochs of "
            f"{len(self.rows)} training rows"
        )
        for told in self._warnings(rows * columns, channels):
            supervisor.say(told)
        self.copy = self._local_copy(disk, cache)
        other = None if target is None or target.own else target.cache
        self.target_copy = None if other is None else self._local_copy(disk, other)
        if config.shuffle_files is not None and group.is_main:
            self._tell_quality_of_shuffle()
        self.decode = self._load_decoder() if group.is_main else None
        self.by_time = LossByTime(group.device)
        kept = config.power_averages
        self.snapshots = None if kept is None else Snapshots(out, kept, config.steps, supervisor.say)
        self.resume(wandb_project)

    def _warnings(self, cells: int, channels: int) -> list[str]:
        """Return what the user should know of a recipe for latents of this shape."""
        config, told = self.config, [width_warning(self.config.model, channels)]
        if config.model.wide_head is not None and self.cache.manifest.distribution == "gaussian":
            told.append(
                "warning: diffusion.model.wide_head is made for features of a vision model, but these are latents "
                "of a KL autoencoder. On such latents it made results worse: FID 11.7 instead of 7.1 (RAE)."
            )
        if config.objective == "flow":
            told += [shift_told(key, getattr(config, key), cells, channels) for key in ("time_shift", "sample_shift")]
        return [text for text in told if text is not None]

    @property
    def _num_parameters(self) -> int:
        return sum(p.numel() for p in self.trainer.model_parameters)

    def _training_rows(self) -> NDArray[np.int64]:
        cache, say = self.cache, self.supervisor.say
        rows = cache.training_rows
        if self.target is not None:
            rows = rows[self.target.cache.valid[rows]]
        if not len(rows):
            raise UsageError(f"{cache.path}: expected valid rows to train on, found none that are not held out.")
        if self.config.batch_size > len(rows):
            say(f"a batch of {self.config.batch_size} is larger than the {len(rows)} rows: some rows occur twice in it")
        if not (cache.valid & cache.heldout).any():
            say("no held-out rows in this cache: held-out loss is not measured")
        if empty := cache.untrained_classes:
            names = ", ".join(f"{label} ({cache.classes[label]})" for label in empty[:5])
            say(
                f"warning: {len(empty)} of {len(cache.classes)} classes have no training images: {names}"
                f"{', …' if len(empty) > 5 else ''}. They are not sampled."
            )
        return rows

    def _local_copy(self, disk: LocalDisk | None, cache: FeatureCache) -> LocalCopy | None:
        if disk is None:
            return None
        folder, group = disk.folder_of(cache, self.out), self.group
        return LocalCopy(cache, folder, group.rank, group.size, self.supervisor.say)

    def _tell_quality_of_shuffle(self) -> None:
        config, views = self.config, len(self.cache.views) if self.config.use_flips else 1
        files, blocks = self.rows // self.cache.store.spec.unit_rows, blocks_of(self.cache, self.rows, config)
        measure = partial(pairs_in_one_file, files, seed=config.seed, batch_size=config.batch_size, num_views=views)
        self.supervisor.say(
            f"shuffling within blocks of {config.shuffle_files} files: {measure(blocks=blocks):.2%} of the pairs of "
            f"rows in a batch lie in one file; {measure(blocks=None):.2%} if all rows were shuffled"
        )

    def _load_decoder(self) -> Decode | None:
        if self.decoder is None:
            return None
        from ..networks.autoencoder import latent_decoder

        return latent_decoder(self.decoder)

    @property
    def statistics(self) -> dict[str, Tensor]:
        """Channel mean and standard deviation of the latents."""
        arrays = {"channel_mean": self.cache.channel_mean, "channel_std": self.cache.channel_std}
        channels = self.cache.manifest.latent_shape[-1]
        return {name: torch.from_numpy(values[:channels].copy()) for name, values in arrays.items()}

    @property
    def _described(self) -> dict[str, list[Any]]:
        return {"class_names": self.cache.classes, "untrained_classes": self.cache.untrained_classes}

    def load(self, saved: Checkpoint) -> None:
        self.trainer.load(saved.groups)
        if self.group.is_main:  # sums since the last line of the log, over all processes
            self.by_time.sums.copy_(saved.groups["window"]["loss_by_time"])

    def state(self) -> Checkpoint:
        groups = {**self.trainer.state(), "statistics": self.statistics}
        groups["window"] = {"loss_by_time": self.group.sum(self.by_time.sums)}
        grid, channels = self.trainer.model.grid, self.trainer.model.in_channels
        return Checkpoint(self.step, groups, self._described | {"grid": grid, "channels": channels})

    def batches(self) -> Iterator[CacheBatch]:
        share = self.group.local_slice(self.config.batch_size)
        say, copies = self.supervisor.say, {"copy": self.copy, "target_copy": self.target_copy}
        return iter(
            CacheBatches(self.cache, self.rows, self.config, self.step, share, say, target=self.target, **copies)
        )

    def take_step(self, batch: CacheBatch) -> Step:
        result = self.trainer(self.step, *batch)
        self.by_time.add(result.sample_losses, result.times)
        return result

    def settle(self) -> None:
        self.trainer.guard.settle()

    def logged(self, result: Step) -> tuple[dict[str, float], str]:
        by_time = self.by_time.summed(self.group).means()
        self.by_time = LossByTime(self.group.device)
        loss, norm = result.loss.item(), result.grad_norm.item()
        aligned = {} if result.alignment is None else {"alignment": result.alignment.item()}
        told = "".join(f"  alignment {value:.4f}" for value in aligned.values())
        return {"loss": loss, "grad_norm": norm, **aligned, **by_time}, f"loss {loss:.4f}{told}"

    def measure(self) -> None:
        config = self.config
        if self.step % config.eval_every == 0:
            self.evaluate()
        if self.step % config.sample_every == 0:
            self.sample_grid()
        if self.step % config.quality_every == 0:
            self.measure_quality()
        self.keep_averages()

    def keep_averages(self) -> None:
        """Write a snapshot of the power averages, if one is due."""
        if self.snapshots is not None and self.snapshots.due(self.step):
            averages = self.trainer.power_weights()
            if self.log is not None:
                self.supervisor.check()
                self.snapshots.write(self.step, averages)

    def evaluate(self) -> float | None:
        """Return the mean loss of the first EMA weights on held-out rows, with fixed noise and times."""
        value = heldout_loss(self.trainer.averages[0], self.cache, self.config, self.group, self.supervisor.say)
        if value is not None and self.log is not None:
            self.log.write(self.step, heldout_loss=value)
            self.supervisor.say(f"step {self.step}: held-out loss {value:.4f}")
        return value

    @cached_property
    def quality(self) -> LatentQuality:
        """Reads its rows of the cache when first used."""
        return LatentQuality(self.cache, self.config, self.group, self.supervisor.say)

    def measure_quality(self) -> None:
        """Measure samples of the first EMA weights in latent space."""
        if not self.config.quality_samples:
            return
        self.supervisor.advance(0, f"sampling {self.config.quality_samples} latents to measure")
        quality = self.quality.measure(self.trainer.averages[0])
        if self.log is None or not quality:
            return
        self.log.write(self.step, **quality)
        words = {"latent_fd": "latent Fréchet distance", "latent_accuracy": "in the right class"}
        told = [
            f"{words[k]} {quality[k]:.3g}" + (f" (real {real:.3g})" if (real := quality.get(f"{k}_real")) else "")
            for k in words
            if k in quality
        ]
        self.supervisor.say(f"step {self.step}: {', '.join(told)}")

    def sample_grid(self) -> None:
        """Write a sheet of samples of the first EMA weights, if there is a decoder."""
        if self.decoder is None:
            return
        settings = settings_in_training(self.config, self.cache)
        latents = sample_in_training(self.trainer.averages[0], GRID_SAMPLES, settings, self.config, self.group)
        if self.log is None or self.decode is None:
            return
        shape = (GRID_SAMPLES, *self.cache.manifest.latent_shape)
        features = self.cache.denormalize(latents.cpu().numpy().reshape(shape))
        sheet = tile(self.decode(features), 8)
        folder = self.out / "samples"
        make_directory(folder)
        write_atomic(folder / f"step-{self.step:08d}.png", encode_png(sheet))
        self.log.image(self.step, "samples", sheet)

    def finish(self) -> DiffusionManifest:
        """Measure a last time, and write all weights.

        Returns:
            The manifest.
        """
        loss = self.evaluate()
        self.sample_grid()
        self.measure_quality()
        self.keep_averages()
        weights = self.trainer.weights()
        content = {}
        for copy in (self.copy, self.target_copy):
            if copy is not None:
                copy.close(delete=True)
        if self.log is not None:
            self.log.close()
            self.supervisor.check()
            content = {
                weights_file(name): save_tensors(self.out / weights_file(name), state)
                for name, state in weights.items()
            }
            content |= {} if self.snapshots is None else self.snapshots.finish()
            content[STATISTICS_FILE] = save_tensors(self.out / STATISTICS_FILE, self.statistics)
        return DiffusionManifest(
            steps=self.config.steps,
            grid=self.trainer.model.grid,
            channels=self.trainer.model.in_channels,
            content=content,
            num_parameters=self._num_parameters,
            **self._described,
            heldout_loss=loss,
        )
