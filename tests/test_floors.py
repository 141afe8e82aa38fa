"""The architecture: imports only go down, and light imports stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.imports import arrows, floor_of, imported, modules, modules_of, package_of, statements

FLOORS_BELOW = {
    "pipeline": {"stages", "models", "manifests"},
    "stages": {"models", "manifests"},
    "models": set(),
    "manifests": set(),
}
SHARED = {"runtime", "images", "networks", "training"}
# Packages of stages/ that each package may import. A job uses the shared packages, not another job. The few
# exceptions are listed with their reasons.
PACKAGES_BELOW = {
    "runtime": set[str](),
    "images": {"runtime"},
    "networks": {"runtime", "images"},
    "training": {"runtime"},
    "shard": {"runtime", "images"},
    "label_maps": {"runtime", "images"},
    "train_autoencoder": SHARED,
    "extract": SHARED,
    "train_diffusion": SHARED,
    "sample": SHARED,
    "evaluate": SHARED | {"extract"},  # an imported autoencoder is aligned before its first use
    "analyze": SHARED | {"evaluate"},  # confidence intervals
    "import_latents": SHARED | {"extract"},  # counting rejects
    # repair makes units again; requantize_cost measures the held-out loss.
    "artifacts": SHARED | {"extract", "import_latents", "train_diffusion"},
}


def test_imports_only_go_down() -> None:
    up = [(a, b) for a, b in arrows() if floor_of(a) != floor_of(b) and floor_of(b) not in FLOORS_BELOW[floor_of(a)]]
    assert not up


def test_packages_of_stages_only_import_those_below() -> None:
    pairs = {(package_of(a), package_of(b), a, b) for a, b in arrows() if floor_of(a) == floor_of(b) == "stages"}
    wrong = [
        f"{a} imports {b}"
        for above, below, a, b in sorted(pairs)
        if above != below and below.split(".")[-1] not in PACKAGES_BELOW[above.split(".")[-1]]
    ]
    assert not wrong
    assert {package_of(module).split(".")[-1] for module in modules_of("stages")} == set(PACKAGES_BELOW)
    list(TopologicalSorter(PACKAGES_BELOW).static_order())  # raises CycleError


def test_an_installation_holds_every_package() -> None:
    """An editable installation works without this list; `pip install .` copies only the packages in it."""
    root = Path(__file__).parents[1]
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted({f"svgpipe.{package_of(module)}" for module in modules()})


def test_functions_are_short() -> None:
    """None is longer than 60 lines, nine in ten have at most 35."""
    functions = [
        (node.end_lineno - node.lineno + 1, f"{file}: {node.name}")
        for floor in FLOORS_BELOW
        for file in Path(__file__).parents[1].joinpath(floor).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None
    ]
    assert len(functions) > 100
    assert [name for lines, name in functions if lines > 60] == []
    assert sum(lines <= 35 for lines, _ in functions) >= 0.9 * len(functions)


def test_imports_are_relative_inside_a_floor_and_absolute_between() -> None:
    """Editors and code hosts resolve relative imports without the mapping of folder X to svgpipe.X."""
    wrong = []
    for module in modules():
        for statement in statements(module):
            own = (statement.module or "").split(".")[:2] == ["svgpipe", floor_of(module)]
            if own and not statement.level:
                wrong.append(f"{module}: from {statement.module}")
    assert not wrong


def test_no_circles_and_no_utils() -> None:
    list(TopologicalSorter({module: imported(module) - {module} for module in modules()}).static_order())
    assert not [name for name in modules() if name.split(".")[-1] in {"utils", "helpers", "common", "misc"}]


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("from svgpipe.manifests import FeatureCache", ("torch", "timm", "webdataset", "ray")),
        ("import svgpipe.pipeline.cli", ("torch", "timm", "webdataset", "ray")),
        ("import svgpipe.pipeline.status", ("torch", "timm", "webdataset", "ray")),
        ("import svgpipe.stages.shard.from_images", ("torch", "timm", "webdataset", "ray")),
        ("import svgpipe.stages.train_diffusion.stage", ("timm", "webdataset", "ray")),
        ("import svgpipe.models.dit, svgpipe.models.sampler", ("timm", "torchvision", "ray", "torch._dynamo")),
    ],
)
def test_light_doors(statement: str, forbidden: tuple[str, ...]) -> None:
    check = f"{statement}; import sys; print([m for m in {forbidden!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
