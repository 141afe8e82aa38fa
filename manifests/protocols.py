"""Named protocols of measurement: what a published number was measured with.

A protocol replaces keys of the recipe's section `evaluation`, as a preset does for sampling. Keys that stand beside it
in the same file, or that the command line gives, win; the report lists them as deviations.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from .feature_spaces import NAMES as SPACES

Protocol = Literal["adm", "edm2", "fdr6"]
NAMES: tuple[Protocol, ...] = get_args(Protocol)

_COMMON: dict[str, Any] = {
    "num_samples": 50_000,
    "extractor": {"kind": "inception", "weights": "hub", "name": None, "input_size": None},
    "reference_images": None,
    "spaces": None,
    "spatial_distance": False,
    "inception_in_order": False,
    "seeds": None,
}
_OWN: dict[Protocol, dict[str, Any]] = {
    # guided-diffusion evaluations/evaluator.py: FID, sFID, Inception Score, precision and recall. Its reference is an
    # .npz with the statistics of all training images and 10,000 images.
    "adm": {"spatial_distance": True, "inception_in_order": True},
    # edm2 calculate_metrics.py: FID and FD-DINOv2, each the minimum of three seeds.
    "edm2": {"spaces": {"dinov2-l": "hub"}, "seeds": 3},
    # arXiv 2604.28190: mean over Inception and five other spaces of FD(samples, train) / FD(held-out, train).
    "fdr6": {"spaces": dict.fromkeys(SPACES, "hub")},
}


def protocol_values(name: Protocol) -> dict[str, Any]:
    """Return the keys of `evaluation` that a protocol sets."""
    return {**_COMMON, **_OWN[name]}
