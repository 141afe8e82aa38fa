"""Kinds of guidance at equal cost: Fréchet distance of samples with the same number of network evaluations.

    .venv/bin/python -m tests.benchmarks.guidance MODEL AUTOENCODER REFERENCE --guide GUIDE --out DIR

MODEL is a finished diffusion model with an auxiliary head (`diffusion.model.auxiliary_depth`), GUIDE a worse model of
the same cache, for example one that was trained for fewer steps. MODEL is sampled with every kind, with Euler steps and
three scales; the best scale counts. The settings are those of the recipe `fashion-mnist`. An evaluation of GUIDE counts
as one, though it may be smaller. DIR keeps the samples; the same command resumes. The last line is JSON: distances
over that without guidance.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from svgpipe.manifests.estimate import Estimate
from svgpipe.manifests.evaluation import Report
from svgpipe.manifests.evaluation_section import EvaluationSection
from svgpipe.manifests.recipe_loader import load_recipe
from svgpipe.models.flow import shift_of
from svgpipe.models.guidance import Guidance
from svgpipe.models.sampler import time_grid
from svgpipe.stages.evaluate.reference import open_reference
from svgpipe.stages.evaluate.stage import sample_and_eval
from svgpipe.stages.networks.diffusion import open_diffusion

SCALES = (1.25, 1.5, 2.0)


@dataclass(frozen=True)
class Kind:
    """A kind of guidance.

    Attributes:
        second: evaluations of another model or label in a guided step.
    """

    name: str
    mode: str = "constant"
    second: int = 1
    internal: bool = False
    guided: bool = False  # by GUIDE

    def evaluations(self, steps: int, shift: float, scale: float) -> int:
        """Return the number of network evaluations of a sample."""
        guidance = Guidance(scale, self.mode)
        weights = [guidance.weights(step, steps, t) for step, t in enumerate(time_grid(steps, shift)[:-1].tolist())]
        return sum(1 + self.second * (other != 0) for _, other in weights)

    def steps(self, evaluations: int, shift: float) -> int:
        """Return the most steps with at most this number of evaluations."""
        fitting = [n for n in range(1, evaluations + 1) if self.evaluations(n, shift, SCALES[0]) <= evaluations]
        return fitting[-1]


KINDS = (
    Kind("classifier-free"),
    Kind("classifier-free, in an interval", mode="interval-0.2-0.8"),
    Kind("autoguidance", guided=True),
    Kind("internal", mode="interval-0-0.9", second=0, internal=True),
)


def measured(arguments: argparse.Namespace, kind: Kind, steps: int, scales: tuple[float, ...]) -> list[Estimate]:
    """Return the distance of the samples of a kind, for every scale."""
    given = load_recipe("fashion-mnist").evaluation.model_dump()
    changes = {
        "steps": [steps],
        "guidance": scales,
        "guidance_mode": kind.mode,
        "internal_guidance": kind.internal,
        "time_shift": arguments.time_shift,
    }
    config = EvaluationSection.model_validate(given | changes)
    out = arguments.out / f"{kind.name.replace(', ', '-').replace(' ', '-')}-{steps}-{len(scales)}"
    reference = open_reference(arguments.reference, count=None, pool=arguments.out)
    guide = arguments.guide if kind.guided else None
    sample_and_eval(arguments.model, arguments.autoencoder, reference, out, config, guide=guide)
    return [result.frechet_distance for result in Report.read(out).results if result.role == "samples"]


def row(told: Callable[[str], None], name: str, steps: int, evaluations: int, scale: float, value: Estimate) -> None:
    """Print one line of the table."""
    interval = "" if value.low is None else f"  ({value.low:.1f} to {value.high:.1f})"
    told(f"{name:34}{steps:6}{evaluations:13}{scale:7.2f}{value.value:10.1f}{interval}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "autoencoder"):
        parser.add_argument(name, type=Path)
    parser.add_argument("reference", help="folder with images")
    parser.add_argument("--guide", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--evaluations", type=int, default=40, help="network evaluations per sample")
    arguments = parser.parse_args()
    trained = open_diffusion(arguments.model)
    arguments.time_shift = trained.section.time_shift  # as in training
    shift = shift_of(arguments.time_shift, trained.cells, trained.channels)
    budget = arguments.evaluations
    plain = measured(arguments, Kind("none", second=0), budget, (1.0,))[0]
    lines: list[str] = []
    row(lines.append, "none", budget, budget, 1.0, plain)
    ratios = {}
    for kind in KINDS:
        steps = kind.steps(budget, shift)
        values = measured(arguments, kind, steps, SCALES)
        for scale, value in zip(SCALES, values, strict=True):
            row(lines.append, kind.name, steps, kind.evaluations(steps, shift, scale), scale, value)
        ratios[kind.name] = min(value.value for value in values) / plain.value
    print(f"{'guidance':34}{'steps':>6}{'evaluations':>13}{'scale':>7}{'distance':>10}  95 % interval")
    print("\n".join(lines))
    print(json.dumps({name: round(ratio, 3) for name, ratio in ratios.items()}))


if __name__ == "__main__":
    main()
