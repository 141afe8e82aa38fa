"""Snapshots of power averages during a training.

A snapshot is written before the checkpoint of its step, so a resumed run has all earlier ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from torch import Tensor

from svgpipe.manifests.checkpoint import save_tensors
from svgpipe.manifests.diffusion_section import PowerAverageSection
from svgpipe.manifests.filesystem import Location, children, make_directory
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.power_averages import AVERAGES_FOLDER, snapshot_file, snapshot_unit

from ..runtime.retry import call_with_retries


class Snapshots:
    """The snapshots of one run, at multiples of `every` steps and at the last step."""

    def __init__(self, out: Location, config: PowerAverageSection, steps: int, say: Callable[[str], None]) -> None:
        """Keep them in `out`. `say` receives messages about retries."""
        self.out, self.config, self.steps, self.say = out, config, steps, say
        self.journal = Journal(out, AVERAGES_FOLDER)

    def due(self, step: int) -> bool:
        """Return whether the averages after step `step` are kept."""
        return step % self.config.every == 0 or step == self.steps

    def write(self, step: int, averages: dict[float, dict[str, Tensor]]) -> None:
        """Write the averages after step `step` as float16. Raises the errors of `save_tensors`."""
        make_directory(self.out / AVERAGES_FOLDER)
        written: dict[str, str | None] = {}
        for sigma, tensors in averages.items():
            halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
            file = snapshot_file(step, sigma)
            written[file] = call_with_retries(partial(save_tensors, self.out / file, halves), self.say)
        self.journal.record(snapshot_unit(step), {}, written)

    def finish(self) -> dict[str, str]:
        """Delete snapshots that are not due, of an earlier, shorter run. Tell if some that were due are gone.

        Returns:
            sha256 of every file, as it was written.
        """
        steps = [*range(self.config.every, self.steps, self.config.every), self.steps]
        whole = self.journal.whole([snapshot_unit(step) for step in steps])
        for path in children(self.out / AVERAGES_FOLDER):
            if _step_of(path.name) not in steps:
                path.unlink()
        if len(whole) < len(steps):
            self.say(
                f"warning: {len(steps) - len(whole)} of {len(steps)} snapshots in {self.out / AVERAGES_FOLDER} are "
                "gone; svgpipe ema uses the others"
            )
        return {file.name: file.sha256 for record in whole.values() for file in record.files}


def _step_of(name: str) -> int | None:
    """Return the step of a file of snapshots; None for another file."""
    match = re.match(r"step-(\d+)[-.]", name)
    return None if match is None else int(match[1])
