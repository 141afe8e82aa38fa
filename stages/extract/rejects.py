"""Images that could not be used: how many, why, and whether a run should go on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from svgpipe.manifests.errors import SvgpipeError

# A run is going wrong once this many rejects come at this many times the rate that was accepted.
EARLY_COUNT, EARLY_FACTOR = 10, 5.0


@dataclass(frozen=True)
class Reject:
    """An image that could not be used: its row, where it lies, and why."""

    row: int  # inside its unit in the journal, in the whole cache in rejected.jsonl
    tar: str
    offset: int
    key: str
    reason: str


class TooManyRejectsError(SvgpipeError):
    """More images are unusable than the user accepts."""


class RejectTally:
    """Counts rejects of a run over `total` rows of which the share `limit` may be rejected."""

    def __init__(self, total: int, limit: float) -> None:
        self.total, self.limit = total, limit
        self.seen = 0
        self.reasons: Counter[str] = Counter()

    def add(self, rows: int, reasons: Sequence[str]) -> None:
        """`rows` more rows were looked at; `reasons` says why some of them could not be used.

        Raises:
            TooManyRejectsError: with the tally by reason.
        """
        self.seen += rows
        self.reasons.update(map(kind_of, reasons))
        rejected = sum(self.reasons.values())
        certain = rejected > self.limit * self.total
        likely = rejected >= EARLY_COUNT and rejected > EARLY_FACTOR * self.limit * self.seen
        if certain or likely:
            raise TooManyRejectsError(
                f"{rejected} of {self.seen} images so far were rejected ({rejected / self.seen:.2%}; "
                f"--max-rejects accepts {self.limit:.2%} of {self.total}):\n  {self.by_reason()}\n"
                f"Finished work is kept. Mend the shards, or go on with --max-rejects "
                f"{min(1.0, max(rejected / self.seen, rejected / self.total) * 1.2):.2g}."
            )

    def by_reason(self) -> str:
        """One line per reason, the most frequent first."""
        return "\n  ".join(f"{count} × {reason}" for reason, count in self.reasons.most_common())


def kind_of(reason: str) -> str:
    """The part of a reason that images have in common: `undecodable: broken data stream` → `undecodable`."""
    return reason.partition(":")[0]
