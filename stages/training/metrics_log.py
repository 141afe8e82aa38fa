"""The log of a training run: metrics.jsonl, TensorBoard, and optionally Weights & Biases."""

from __future__ import annotations

import importlib.util
import json
import uuid
from pathlib import Path
from typing import Any

from svgpipe.manifests.errors import UsageError, first_line
from svgpipe.manifests.filesystem import Location, write_atomic
from svgpipe.manifests.manifest import read_plan
from svgpipe.manifests.metrics_file import METRICS_NAME, read_metrics

from ..runtime.retry import call_with_retries

WANDB_ID_NAME = "wandb-id"


class MetricsLog:
    """metrics.jsonl and TensorBoard scalars of one run. A resumed run drops entries after its step.

    An object store cannot append: metrics.jsonl is rewritten at every `flush`, and there are no TensorBoard files.
    """

    def __init__(
        self, directory: Location, start_step: int, wandb_project: str | None = None, *, ended: bool = False
    ) -> None:
        """Open the log of the run in `directory` at `start_step`; `ended`: all steps are done.

        Raises the error of `require_wandb`, or UsageError if wandb is not logged in.
        """
        self.path = directory / METRICS_NAME
        self._wandb = None if wandb_project is None else _wandb_run(directory, wandb_project)
        kept = [entry for entry in read_metrics(self.path) if entry["step"] <= start_step]
        if ended:  # the measurements after the last step are repeated
            kept = [entry for entry in kept if entry["step"] < start_step or "learning_rate" in entry]
        self._lines = [json.dumps(entry) + "\n" for entry in kept]
        self._write_whole()
        # Imported here, because it is slow to load, and encoder workers import this file without writing a log.
        from torch.utils.tensorboard import SummaryWriter

        local = isinstance(directory, Path)
        self._file = self.path.open("a") if isinstance(self.path, Path) else None
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=start_step + 1) if local else None

    @property
    def address(self) -> str | None:
        """Address of the page at Weights & Biases, if there is one."""
        return None if self._wandb is None else self._wandb.url

    def write(self, step: int, **values: float) -> None:
        """Append one line with these scalars; `step` counts finished optimizer steps."""
        line = json.dumps({"step": step, **values}) + "\n"
        if self._file is None:
            self._lines.append(line)
        else:
            self._file.write(line)
            self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values, step=step)

    def image(self, step: int, name: str, pixels: Any) -> None:
        """Log an (H,W,3) uint8 picture."""
        if self._board is not None:
            self._board.add_image(name, pixels, step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({name: wandb.Image(pixels)}, step=step)

    def flush(self) -> None:
        """Write everything to disk; called before a checkpoint names its step."""
        if self._file is None:
            call_with_retries(self._write_whole)
        if self._board is not None:
            self._board.flush()

    def _write_whole(self) -> None:
        write_atomic(self.path, "".join(self._lines).encode())

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def require_wandb() -> None:
    """Check that Weights & Biases is installed, before workers are started.

    Raises:
        UsageError: it is not.
    """
    if importlib.util.find_spec("wandb") is None:
        raise UsageError("--wandb: needs the package wandb. Install it with `pip install wandb`.")


def _wandb_run(directory: Location, project: str) -> Any:
    """Return the wandb run of this directory, the same one at every resume: its id lies in the directory.

    Raises:
        UsageError: wandb cannot start.
    """
    require_wandb()
    import wandb

    plan, kept = read_plan(directory), directory / WANDB_ID_NAME
    if not kept.exists():
        write_atomic(kept, uuid.uuid4().hex[:16].encode())
    try:
        return wandb.init(
            project=project,
            name=f"{directory.parent.name}/{directory.name}",
            id=kept.read_bytes().decode(),
            resume="allow",
            dir=str(directory) if isinstance(directory, Path) else None,
            config=plan["config"],
            settings=wandb.Settings(silent=True, console="off", save_code=False),
        )
    except wandb.errors.Error as error:
        raise UsageError(
            f"--wandb {project}: {first_line(error)} Log in with `wandb login`, or set WANDB_MODE=offline."
        ) from error
