"""metrics.jsonl: the log of a training run, one JSON object per line, in order of steps."""

from __future__ import annotations

import json

from .errors import ArtifactError
from .filesystem import Location

METRICS_NAME = "metrics.jsonl"


def read_metrics(path: Location) -> list[dict[str, float]]:
    """Return the lines of a metrics.jsonl. A last line that was truncated by a kill is skipped.

    Raises:
        ArtifactError: any other line is not JSON.
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
