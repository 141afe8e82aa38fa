"""Shared fixtures: golden recordings, small real photographs, one Ray for the whole session."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(os.environ.get("SVGPIPE_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))


class Golden:
    """One recorded fixture: its JSON, and its tensors, with a memory of which were looked at."""

    def __init__(self, folder: Path, name: str) -> None:
        self.meta: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
        self._tensors = load_file(folder / f"{name}.safetensors")
        self._used: set[str] = set()
        listed = set(self.meta["tensors"])
        assert listed == set(self._tensors), f"{name}: JSON and safetensors list different tensors"
        for key, tensor in self._tensors.items():
            assert list(tensor.shape) == self.meta["tensors"][key]["shape"], key

    def __getitem__(self, key: str) -> Tensor:
        self._used.add(key)
        return self._tensors[key]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """All tensors below `prefix`, without it, in float32 where floating."""
        keys = [k for k in self._tensors if k.startswith(prefix)]
        self._used.update(keys)
        return {k.removeprefix(prefix): self._tensors[k] for k in keys}

    @property
    def unused(self) -> set[str]:
        return set(self._tensors) - self._used

    @property
    def atol(self) -> float:
        return float(self.meta["suggested_atol"])


class GoldenFolder:
    """Opens fixtures by name; `others` gives weights without asking that all their tensors be used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._opened: list[tuple[str, Golden]] = []

    def open(self, name: str) -> Golden:
        golden = Golden(self.folder, name)
        self._opened.append((name, golden))
        return golden

    def weights_of(self, file_name: str) -> Golden:
        return Golden(self.folder, file_name.removesuffix(".safetensors"))

    def check_all_used(self) -> None:
        for name, golden in self._opened:
            assert not golden.unused, f"{name}: recorded, but compared with nothing: {sorted(golden.unused)}"


@pytest.fixture
def golden() -> Any:
    """The recorded behaviour of the official code; every tensor of an opened fixture must be used."""
    if not (GOLDEN / "README.md").exists() and not list(GOLDEN.glob("*.json")):
        pytest.skip(f"no golden recordings at {GOLDEN}; set SVGPIPE_GOLDEN to their folder")
    folder = GoldenFolder(GOLDEN)
    yield folder
    folder.check_all_used()
