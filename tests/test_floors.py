"""The architecture: imports only go down, and light doors stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "pipeline": {"pipeline", "stages", "models", "manifests"},
    "stages": {"stages", "models", "manifests"},
    "models": {"models"},
    "manifests": {"manifests"},
}
MODULES = sorted(path for floor in MAY_IMPORT for path in (ROOT / floor).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Modules of svgpipe that a file imports anywhere, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module and node.module.split(".")[0] == "svgpipe":
                found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "svgpipe"}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_go_down(path: Path) -> None:
    floor = path.relative_to(ROOT).parts[0]
    above = {name for name in imported(path) if name.split(".")[1] not in MAY_IMPORT[floor]}
    assert not above, f"{path.relative_to(ROOT)} imports {sorted(above)}"


def test_no_circles_and_no_utils() -> None:
    names = {f"svgpipe.{'.'.join(p.relative_to(ROOT).with_suffix('').parts)}": p for p in MODULES}
    graph = {name: imported(path) & set(names) for name, path in names.items() if path.name != "__init__.py"}
    list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert not [p for p in MODULES if p.stem in {"utils", "helpers", "common", "misc"}]


def test_every_floor_has_files() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("from svgpipe.manifests import FeatureCache", ("torch", "timm", "webdataset", "ray")),
        ("import svgpipe.pipeline.cli", ("torch", "timm", "webdataset", "ray")),
        ("import svgpipe.stages.shard", ("torch", "timm", "webdataset", "ray")),
        ("import svgpipe.stages.train_diffusion", ("timm", "webdataset", "ray")),
        ("import svgpipe.models.dit, svgpipe.models.sampler", ("timm", "torchvision", "ray", "torch._dynamo")),
    ],
)
def test_light_doors(statement: str, forbidden: tuple[str, ...]) -> None:
    check = f"{statement}; import sys; print([m for m in {forbidden!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
