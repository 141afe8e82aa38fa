"""Rejected rows of a cache: rejected.jsonl, and the same in the records of the units."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from .manifest import Json
from .store_spec import StoreSpec

REJECTS_NAME = "rejected.jsonl"


@dataclass(frozen=True)
class Reject:
    """A rejected image: row, location and reason."""

    row: int  # within its unit in the journal; in the whole cache in rejected.jsonl
    tar: str
    offset: int
    key: str
    reason: str


def rejects_of(records: Sequence[Json], spec: StoreSpec) -> list[Reject]:
    """Return the rejects in the records of all units, `row` counted in the whole cache."""
    return [
        Reject(**{**reject, "row": spec.rows_of(unit)[reject["row"]]})
        for unit, record in enumerate(records)
        for reject in record["rejects"]
    ]


def reject_lines(rejects: Sequence[Reject]) -> bytes:
    """Return the content of rejected.jsonl."""
    return "".join(json.dumps(asdict(reject), sort_keys=True) + "\n" for reject in rejects).encode()
