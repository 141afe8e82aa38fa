"""The import graph of svgpipe, from its source: `python -m tests.imports` prints its size.

An arrow is one file that imports another: `from ..images import decode` or `from svgpipe.models.dit import DiT`, also
inside functions.
"""

from __future__ import annotations

import ast
from collections import Counter
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = ("pipeline", "stages", "models", "manifests")


@cache
def modules() -> dict[str, Path]:
    """Return every module of the four floors by name, `__init__.py` under the name of its package."""
    paths = (path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py")))
    return {_name(path): path for path in paths}


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("svgpipe", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def floor_of(module: str) -> str:
    """`svgpipe.stages.extract.align` → `stages`."""
    return module.split(".")[1]


def package_of(module: str) -> str:
    """`svgpipe.stages.extract.align` → `stages.extract`; a module directly in its floor → the floor."""
    parts = module.split(".")[1:]
    return ".".join(parts[:2]) if len(parts) > 2 or _is_package(module) else parts[0]


def _is_package(module: str) -> bool:
    path = modules().get(module)
    return path is not None and path.name == "__init__.py" and module.count(".") > 1


def statements(module: str) -> list[ast.ImportFrom]:
    """All `from … import …` statements of a module."""
    tree = ast.parse(modules()[module].read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]


def target_of(module: str, statement: ast.ImportFrom) -> str:
    """Return the absolute name of the module that a statement imports from."""
    if not statement.level:
        return statement.module or ""
    package = module if modules()[module].name == "__init__.py" else module.rpartition(".")[0]
    base = package.split(".")[: len(package.split(".")) - statement.level + 1]
    return ".".join([*base, *([statement.module] if statement.module else [])])


def imported(module: str) -> set[str]:
    """Modules of svgpipe that a module imports."""
    known = modules()
    found = set()
    for statement in statements(module):
        target = target_of(module, statement)
        inside = {f"{target}.{alias.name}" for alias in statement.names} & set(known)
        found |= inside or ({target} & set(known))
    return found


def arrows() -> list[tuple[str, str]]:
    """All pairs (importing module, imported module)."""
    return [(module, target) for module in modules() for target in sorted(imported(module))]


def main() -> None:
    """Print the arrows within and between packages, and the files that exactly one other file imports."""
    inner = [(a, b) for a, b in arrows() if floor_of(a) == floor_of(b) == "stages"]
    between = Counter((package_of(a), package_of(b)) for a, b in inner if package_of(a) != package_of(b))
    importers = Counter(b for _, b in arrows() if floor_of(b) == "stages")
    print(f"stages: {len(modules_of('stages'))} modules, {len(inner)} arrows")
    print(f"  within packages:  {len(inner) - between.total()}")
    print(f"  between packages: {between.total()}, {len(between)} pairs")
    for (a, b), count in sorted(between.items()):
        print(f"    {a} → {b}: {count}")
    once = sorted(module for module, count in importers.items() if count == 1)
    print(f"  modules with one importer: {len(once)}")


def modules_of(floor: str) -> list[str]:
    """Return the modules of one floor, without `__init__.py`."""
    return [name for name, path in modules().items() if floor_of(name) == floor and path.name != "__init__.py"]


if __name__ == "__main__":
    main()
