"""Checks svgpipe on one CUDA GPU: parity with the CPU, a small pipeline end to end, rates and memory.

    python -m tests.gpu [--out FOLDER]
    python -m tests.gpu --device cpu --small     # a trial of the suite itself

Needs torch, timm and the other libraries of svgpipe, but neither Ray nor a network. Weights are random. Prints a table
and, as the last line, one JSON object; writes both and all errors to FOLDER. Exit code 1 if a check fails.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
import time
import traceback
from pathlib import Path

import torch

from .checks import Check, Setup

GROUPS = (
    ("parity", ("autoencoder", "transformer", "attention", "training_step", "process_groups")),
    ("pipeline", ("end_to_end",)),
    ("rates", ("training", "extraction", "sampling")),
)


class Log:
    """Prints lines and appends them to a file."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "gpu.log"
        self.path.write_text("")

    def __call__(self, text: str) -> None:
        print(text, flush=True)
        with self.path.open("a") as file:
            file.write(f"{text}\n")


def run_group(setup: Setup, module: str, names: tuple[str, ...], log: Log) -> tuple[list[Check], list[str]]:
    """Run the checks of one file.

    Returns:
        The checks, and the names of those that ended with an error.
    """
    checks: list[Check] = []
    errors: list[str] = []
    for name in names:
        started = time.perf_counter()
        torch.compiler.reset()  # else compiled code of other models counts against the limit of recompilations
        try:
            for check in getattr(importlib.import_module(f"{__package__}.{module}"), name)(setup):
                checks.append(check)
                log(str(check))
        except Exception:
            errors.append(f"{module}.{name}")
            log(f"{module}.{name}: ERROR\n{traceback.format_exc()}")
        log(f"  ({module}.{name}: {time.perf_counter() - started:.0f} s)")
        if setup.device.type == "cuda":
            torch.cuda.empty_cache()
    return checks, errors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--only", choices=[name for name, _ in GROUPS])
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA GPU. `--device cpu --small` tries the suite on the CPU.")
    if arguments.device == "cpu":
        torch.cuda.is_available = lambda: False  # the stages choose their device themselves
    setup, log = Setup(torch.device(arguments.device), arguments.small), Log(arguments.out)
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or "CPU"
    log(f"{name}, torch {torch.__version__}, Python {platform.python_version()}")
    checks: list[Check] = []
    errors: list[str] = []
    for module, names in GROUPS:
        if arguments.only in (None, module):
            found, failed = run_group(setup, module, names, log)
            checks, errors = checks + found, errors + failed
    bad = [check.name for check in checks if not check.holds]
    summary = {check.name: round(check.value, 5) for check in checks}
    log(json.dumps({"device": name, "failed": bad, "errors": errors, **summary}))
    return 1 if bad or errors else 0


if __name__ == "__main__":
    sys.exit(main())
