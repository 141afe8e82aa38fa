"""Ray workers write the same bytes as one process without Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import STORE, Finished, Outcome, extract_args, tree_bytes
from .test_sample_and_eval import eval_args, sweep_bytes

pytestmark = pytest.mark.slow
TWO = ("--workers", 2, "--cpus-per-worker", 0.7)


def test_an_extraction(finished: Finished, ray_session: None, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    """Also one that copies the vision features of another cache."""
    for name, options in (("whole", ()), ("copied", ("--vision-from", finished.root / "cache"))):
        found = svgpipe(*extract_args(finished, tmp_path / name, *options, *TWO))
        assert found.code == 0, found.err
        assert tree_bytes(tmp_path / name, *STORE) == tree_bytes(finished.root / "cache", *STORE)


def test_an_evaluation(finished: Finished, ray_session: None, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    found = svgpipe(*eval_args(finished, tmp_path / "evaluation", *TWO))
    assert found.code == 0, found.err
    assert sweep_bytes(tmp_path / "evaluation") == sweep_bytes(finished.root / "evaluation")
