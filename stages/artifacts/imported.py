"""What both halves of `svgpipe import-official` share: the result, and references to official files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from svgpipe.manifests.filesystem import Location, file_sha256
from svgpipe.manifests.manifest import InputRef


@dataclass(frozen=True)
class Imported:
    """Result of importing one file."""

    directory: Location
    fingerprint: str
    what: str
    used: int
    ignored: dict[str, list[str]]  # keys by reason


def as_input(path: Path, kind: str) -> InputRef:
    """Return a reference to an official file."""
    return InputRef(kind=kind, fingerprint=file_sha256(path), path=str(path), config={})


def beside(checkpoint: object, used: list[str]) -> dict[str, list[str]]:
    """Return the unused entries of a checkpoint by reason, without keys of weights."""
    if not (isinstance(checkpoint, dict) and any(name in checkpoint for name in used)):
        return {}  # a bare state dict
    others = [str(name) for name in checkpoint if name not in used]
    return {"training state, which is not imported": others} if others else {}
