"""Writes checkpoints in the background. Training waits only for a copy in memory."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from svgpipe.manifests.checkpoint import Checkpoint, CheckpointStore
from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.filesystem import Location

from ..runtime.retry import call_with_retries
from .distributed import ProcessGroup


class BackgroundSaver:
    """Writes one checkpoint at a time in a thread. An error is raised by the next call."""

    def __init__(self, store: CheckpointStore, say: Callable[[str], None]) -> None:
        """Write to `store`; `say` receives messages about retries."""
        self.store, self.say = store, say
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="svgpipe-checkpoint")
        self._writing: Future[Location] | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Copy the tensors to the CPU and start writing. Waits for the previous checkpoint.

        Tensors are removed from `checkpoint` one by one, so that gathered tensors are held in memory only once.

        Raises the error of a failed previous write, as `wait` does.
        """
        self.wait()
        groups = {name: {k: _copy(group.pop(k)) for k in list(group)} for name, group in checkpoint.groups.items()}
        copy = Checkpoint(checkpoint.step, groups, checkpoint.values)
        self._writing = self._pool.submit(call_with_retries, partial(self.store.save, copy), self.say)

    def check(self) -> None:
        """Raise the error of a write that has failed already."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk. Raises the error of a failed write."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait for the current write, and end the thread. Errors of that write are not raised."""
        self._pool.shutdown(wait=True)


def _copy(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU, because training changes the original."""
    return tensor.detach().to("cpu", copy=True)


def latest_of_all(store: CheckpointStore, group: ProcessGroup, say: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest intact checkpoint, the same one on every process.

    Raises:
        ArtifactError: see `CheckpointStore.latest`; or processes found different checkpoints.
    """
    checkpoint = store.latest(say)
    steps = group.gather_rows(torch.tensor([-1 if checkpoint is None else checkpoint.step]), group.size).tolist()
    if len(set(steps)) > 1:
        raise ArtifactError(
            f"{store.directory}: expected all workers to find the same checkpoint, found steps "
            f"{', '.join(map(str, steps))} (-1: none). It must be visible on all nodes: in a shared folder or an "
            "object store."
        )
    return checkpoint
