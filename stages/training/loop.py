"""The training loop of every model: resume, steps, log, checkpoints, stop on request.

Every rank runs the same code on its local slice of each batch. The main process also writes.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any, ClassVar, Generic, TypeVar

from svgpipe.manifests.autoencoder_section import AutoencoderSection
from svgpipe.manifests.checkpoint import Checkpoint, CheckpointStore
from svgpipe.manifests.diffusion_section import DiffusionSection
from svgpipe.manifests.errors import InterruptedRunError, UsageError, compile_error, memory_error
from svgpipe.manifests.filesystem import Location

from ..runtime.device import peak_memory
from .checkpointing import BackgroundSaver, latest_of_all
from .distributed import ProcessGroup
from .metrics_log import MetricsLog
from .optimizer import learning_rate
from .supervisor import Supervisor

B = TypeVar("B")
S = TypeVar("S")
R = TypeVar("R")


@contextmanager
def explained_errors(advice: str) -> Iterator[None]:
    """Turn errors of the machine in the block into messages: out of memory, ending with `advice`, or no compiler.

    Yields:
        Nothing.

    Raises:
        SvgpipeError: the GPU or the CPU ran out of memory, or torch.compile failed.
    """
    try:
        yield
    except Exception as error:
        if (explained := memory_error(error, advice) or compile_error(error)) is None:
            raise
        raise explained from error


class TrainingRun(ABC, Generic[B, S, R]):
    """One training run in one process. B: type of a batch; S: result of a step; R: result of the run."""

    section: ClassVar[str]  # section of the recipe
    item: ClassVar[str]  # name of the elements of a batch
    config: AutoencoderSection | DiffusionSection

    def __init__(self, group: ProcessGroup, supervisor: Supervisor, out: Location, store: CheckpointStore) -> None:
        """Prepare a run in `out`, whose checkpoints `store` keeps.

        Raises:
            UsageError: a batch has fewer items than there are workers.
        """
        self.group, self.supervisor, self.out, self.store = group, supervisor, out, store
        if self.config.batch_size < group.size:
            raise UsageError(
                f"{self.section}.batch_size: expected at least one {self.item} for each of {group.size} workers, "
                f"found {self.config.batch_size}. Use fewer --workers."
            )
        self.saver = BackgroundSaver(store, supervisor.say)
        self.step = 0
        self.log: MetricsLog | None = None
        self._since, self._steps, self._wait_s = time.monotonic(), 0, 0.0

    @abstractmethod
    def load(self, saved: Checkpoint) -> None:
        """Restore a checkpoint."""

    @abstractmethod
    def state(self) -> Checkpoint:
        """Return the state that `load` restores. All ranks must call this; only the main process gets all tensors."""

    @abstractmethod
    def batches(self) -> Iterator[B]:
        """Return the local slices of all batches, from `step` on."""

    @abstractmethod
    def take_step(self, batch: B) -> S:
        """Make optimizer step number `step`, counted from 0."""

    @abstractmethod
    def logged(self, result: S) -> tuple[dict[str, float], str]:
        """Return values for one line of the log, and a short text for the console. All ranks must call this."""

    @abstractmethod
    def measure(self) -> None:
        """Run the measurements that are due at this step: held-out data, samples."""

    @abstractmethod
    def settle(self) -> None:
        """Wait for values that are being copied to the CPU.

        Raises:
            DivergedError: one is not finite.
        """

    @abstractmethod
    def finish(self) -> R:
        """Measure once more, and write the finished weights.

        Returns:
            The result of the run.
        """

    def last_good(self) -> Location | None:
        """Return the folder of the last checkpoint."""
        self.saver.wait()
        return self.store.newest

    def resume(self, wandb_project: str | None) -> None:
        """Restore the last checkpoint, if there is one, and open the log.

        Raises:
            ArtifactError: no checkpoint is intact, or processes found different ones.
        """
        saved = latest_of_all(self.store, self.group, self.supervisor.say)
        if saved is not None:
            self.load(saved)
            self.step = saved.step
            self.supervisor.say(f"resumed at step {saved.step}")
        if self.group.is_main:
            self.log = MetricsLog(self.out, self.step, wandb_project, ended=self.step >= self.config.steps)
            if self.log.address is not None:
                self.supervisor.say(f"Weights & Biases: {self.log.address}")

    def train(self) -> None:
        """Make steps until `config.steps`, with measurements and checkpoints.

        Raises:
            DivergedError: NaN or infinity.
            InterruptedRunError: the user stopped the run; the state is saved.
        """
        config = self.config
        self.supervisor.begin(f"train-{self.section}", config.steps, "steps", self.step)
        batches = self.batches()
        self._since, reported_memory = time.monotonic(), False
        with self.supervisor.stop_requests() as stop:
            while self.step < config.steps:
                before = time.monotonic()
                batch = next(batches)
                self._wait_s += time.monotonic() - before
                result = self.take_step(batch)
                self.step, self._steps = self.step + 1, self._steps + 1
                if not reported_memory:
                    self.supervisor.say(f"peak memory after one step: {peak_memory(self.group.device) / 1e9:.2f} GB")
                    reported_memory = True
                due = self.step % config.log_every == 0 or self.step == config.steps
                self.supervisor.advance(1, self._write(result) if due else "")
                self._between_steps(self.group.any(stop.seen))
        self.settle()
        self.saver.wait()

    def _write(self, result: S) -> str:
        config = self.config
        values, text = self.logged(result)
        now = time.monotonic()
        seconds, steps, wait_s = now - self._since, self._steps, self._wait_s
        self._since, self._steps, self._wait_s = now, 0, 0.0
        if self.log is None:
            return ""
        rate = steps / seconds
        self.log.write(
            self.step,
            **values,
            learning_rate=learning_rate(self.step - 1, config.steps, config.learning_rate, config.schedule),
            data_wait_share=wait_s / seconds,
            memory_gb=peak_memory(self.group.device) / 1e9,
            **{f"{self.item}s_per_s": rate * config.batch_size},
        )
        return f"{text}  {rate:.2f} steps/s  {rate * config.batch_size:.0f} {self.item}s/s"

    def _between_steps(self, stopping: bool) -> None:
        if self.step < self.config.steps:
            self.measure()
        self.saver.check()
        # Also the last state: the final weights may not fit on a nearly full disk.
        if self.step % self.config.checkpoint_every == 0 or stopping or self.step == self.config.steps:
            self._save()
        if stopping and self.step < self.config.steps:
            self.saver.wait()
            if self.log is not None:
                self.log.close()
            self.supervisor.say(f"step {self.step} is saved")
            self.group.barrier()  # the first process to leave ends the others
            raise InterruptedRunError(
                f"{self.out}: stopped at step {self.step} of {self.config.steps}; saved. The same command resumes."
            )

    def _save(self) -> None:
        self.saver.wait()  # before another state is gathered: two would be in memory
        state = self.state()
        if self.log is not None:
            self.supervisor.check()
            self.log.flush()
            self.saver.save(state)

    def close(self) -> None:
        """Close files and threads. After an error, errors of closing are ignored."""
        self.saver.close()
        if self.log is not None:
            with suppress(Exception):
                self.log.close()


def run_training(
    group: ProcessGroup,
    supervisor: Supervisor,
    *,
    start: Callable[[ProcessGroup, Supervisor], TrainingRun[Any, Any, R]],
    memory_advice: str,
) -> R:
    """Train from the last checkpoint to the finished weights.

    Args:
        group: processes that train.
        supervisor: receives the progress, and may stop the run.
        start: opens the run at its last checkpoint. Must be picklable.
        memory_advice: see `explained_errors`.

    Returns:
        The result of the run.
    """
    with explained_errors(memory_advice), closing(start(group, supervisor)) as run:
        run.train()
        return run.finish()
