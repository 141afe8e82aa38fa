"""Rejected images: their number, their reasons, and when a run stops."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from svgpipe.manifests.errors import SvgpipeError

MAX_REJECTS = 0.001
# A run stops early after this many rejects at this multiple of the accepted rate.
EARLY_COUNT, EARLY_FACTOR = 10, 5.0


class TooManyRejectsError(SvgpipeError):
    """More images are rejected than the user accepts."""


class RejectTally:
    """Counts the rejects of a run. At most the fraction `limit` of its `total` rows may be rejected."""

    def __init__(
        self, total: int, limit: float, noun: str = "images", advice: str = "Repair the shards, or continue with"
    ) -> None:
        self.total, self.limit, self.noun, self.advice = total, limit, noun, advice
        self.seen = 0
        self.reasons: Counter[str] = Counter()

    def add(self, rows: int, reasons: Sequence[str]) -> None:
        """Count `rows` more rows, with the reasons of those that were rejected.

        Raises:
            TooManyRejectsError: too many rows were rejected; with counts by reason.
        """
        self.seen += rows
        self.reasons.update(map(kind_of, reasons))
        rejected = sum(self.reasons.values())
        certain = rejected > self.limit * self.total
        likely = rejected >= EARLY_COUNT and rejected > EARLY_FACTOR * self.limit * self.seen
        if certain or likely:
            raise TooManyRejectsError(
                f"{rejected} of {self.seen} {self.noun} so far were rejected ({rejected / self.seen:.2%}; "
                f"--max-rejects accepts {self.limit:.2%} of {self.total}):\n  {self.by_reason()}\n"
                f"Finished work is kept. {self.advice} --max-rejects "
                f"{min(1.0, max(rejected / self.seen, rejected / self.total) * 1.2):.2g}."
            )

    def by_reason(self) -> str:
        """Return one line per reason, the most frequent first."""
        return "\n  ".join(f"{count} × {reason}" for reason, count in self.reasons.most_common())


def kind_of(reason: str) -> str:
    """Return the common part of reasons: `undecodable: broken data stream` → `undecodable`."""
    return reason.partition(":")[0]
