"""Snapshots of power averages during a training.

A snapshot is written before the checkpoint of its step, so a resumed run has all earlier ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from svgpipe.manifests.checkpoint import save_tensors
from svgpipe.manifests.filesystem import Location, children, file_sha256, make_directory
from svgpipe.manifests.power_averages import AVERAGES_FOLDER, read_snapshot_name, snapshot_file
from svgpipe.manifests.recipe import PowerAverageSection

from ..runtime.retry import call_with_retries


class Snapshots:
    """The snapshots of one run, at multiples of `every` steps and at the last step."""

    def __init__(self, out: Location, config: PowerAverageSection, steps: int, say: Callable[[str], None]) -> None:
        """Keep them in `out`. `say` receives messages about retries."""
        self.out, self.config, self.steps, self.say = out, config, steps, say

    def due(self, step: int) -> bool:
        """Return whether the averages after step `step` are kept."""
        return step % self.config.every == 0 or step == self.steps

    def write(self, step: int, averages: dict[float, dict[str, Tensor]]) -> None:
        """Write the averages after step `step` as float16. Raises the errors of `save_tensors`."""
        make_directory(self.out / AVERAGES_FOLDER)
        for sigma, tensors in averages.items():
            halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
            call_with_retries(partial(save_tensors, self.out / snapshot_file(step, sigma), halves), self.say)

    def finish(self) -> dict[str, str]:
        """Delete snapshots that are not due: of an earlier, shorter run. Tell if some that were due are gone.

        Returns:
            sha256 of every file.
        """
        every, sigmas = self.config.every, self.config.sigmas
        steps = [*range(every, self.steps, every), self.steps]
        names = [snapshot_file(step, sigma) for step in steps for sigma in sigmas]
        for path in children(self.out / AVERAGES_FOLDER):
            name = f"{AVERAGES_FOLDER}/{path.name}"
            if name not in names and read_snapshot_name(name) is not None:
                path.unlink()
        found = [name for name in names if (self.out / name).exists()]
        if len(found) < len(names):
            self.say(
                f"warning: {len(names) - len(found)} of {len(names)} snapshots in {self.out / AVERAGES_FOLDER} are "
                "gone; svgpipe ema uses the others"
            )
        return {name: file_sha256(self.out / name) for name in found}
