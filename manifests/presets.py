"""Named settings of sampling: what the published numbers of each system were made with.

A preset replaces keys of the recipe's section `evaluation`. Keys that stand beside it in the same file, or that the
command line gives, win; the report lists them as deviations. All presets: 50,000 samples with drawn labels. Published
numbers are FID; the extractor stays that of the recipe, and a report calls a distance FID only if it is one.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

Preset = Literal["paper-svg", "paper-svg-unguided", "sit-ode", "sit-sde", "repa", "dit", "lightningdit"]

_COMMON: dict[str, Any] = {
    "num_samples": 50_000,
    "labels": "drawn",
    "precision": "float32",
    "guidance_mode": "constant",
    "guidance_channels": None,
    "time_shift": 1.0,
    "ddim_eta": None,
    "sde": None,
    "internal_guidance": False,
}
_OWN: dict[Preset, dict[str, Any]] = {
    # arXiv 2510.15301: Euler, 25 steps, shift 0.15; XL: 1.55 with CFG-Zero* and a first step of zero.
    "paper-svg": {
        "solver": "euler",
        "steps": [25],
        "guidance": [1.55],
        "guidance_mode": "cfg_star-1-0",
        "time_shift": 0.15,
    },
    "paper-svg-unguided": {"solver": "euler", "steps": [25], "guidance": [1.0], "time_shift": 0.15},
    # SiT sample_ddp.py, and the guidance of the paper's table. With dopri5 the number only chooses output times.
    "sit-ode": {"solver": "dopri5", "steps": [250], "guidance": [1.5], "guidance_channels": 3},
    "sit-sde": {"solver": "sde", "steps": [250], "guidance": [1.5], "guidance_channels": 3},
    # REPA README: guidance where its time, which is 1 at the noise, is at most 0.7.
    "repa": {"solver": "sde", "steps": [250], "guidance": [1.8], "guidance_mode": "interval-0.3-1"},
    # DiT sample_ddp.py.
    "dit": {"solver": "ddpm", "steps": [250], "guidance": [1.5], "guidance_channels": 3},
    # LightningDiT, configuration of 800 epochs: 250 times make 249 steps.
    "lightningdit": {
        "solver": "euler",
        "steps": [249],
        "guidance": [6.7],
        "guidance_mode": "interval-0.1-1",
        "guidance_channels": 3,
        "time_shift": 0.3,
    },
}
NAMES: tuple[Preset, ...] = get_args(Preset)


def preset_values(name: Preset) -> dict[str, Any]:
    """Return the keys of `evaluation` that a preset sets."""
    return {**_COMMON, **_OWN[name]}
