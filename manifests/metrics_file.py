"""metrics.jsonl: what a training run has logged, one JSON object a line, in the order of steps."""

from __future__ import annotations

import json

from .errors import ArtifactError
from .filesystem import Location

METRICS_NAME = "metrics.jsonl"


def read_metrics(path: Location) -> list[dict[str, float]]:
    """Lines of a metrics.jsonl; a last line cut short by a kill is left out.

    Raises:
        ArtifactError: a line other than the last is not JSON.
    """
    if not path.exists():
        return []
    entries = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ArtifactError(f"{path}: line {number}: expected JSON ({error}).") from error
    return entries
