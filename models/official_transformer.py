"""Which system a released transformer is of, and its weights under the names and conventions of `DiT`.

Source: official models of SVG, DiT, SiT, REPA and LightningDiT.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from .convert import State, transformer_from_official
from .dit import time_frequencies
from .official import PATCHES, ROTATIONS, count

# Files that look the same: with learned variance, and without it where REPA's projectors were removed.
WITH_VARIANCE, WITHOUT_VARIANCE = "dit or sit", "sit or repa"
LABELS = "y_embedder.embedding_table.weight"
PROJECTORS = "projectors.", "projectors of the alignment, only needed in training"
LEGACY = re.compile(r"decoder_blocks\.(\d+)\.")
ROTATION_REASON = "tables of rotary positions, which are computed"


def system_of(state: State) -> str | None:
    """Return the system that a state dict looks like: svg, repa, lightningdit, `dit or sit`, or `sit or repa`.

    None: no transformer.
    """
    if LABELS not in state:
        return None
    if PATCHES not in state:
        return "svg"
    if any(key.startswith((PROJECTORS[0], "decoder_blocks.")) for key in state):
        return "repa"
    if "blocks.0.mlp.w12.weight" in state or ROTATIONS[0] in state or "blocks.0.norm1.weight" in state:
        return "lightningdit"
    patches, final = state[PATCHES], state.get("final_layer.linear.weight")
    once = patches.shape[1] * patches.shape[-1] ** 2 if patches.ndim == 4 else 0
    return WITHOUT_VARIANCE if final is not None and final.shape[0] == once else WITH_VARIANCE


@dataclass(frozen=True)
class OfficialTransformer:
    """Weights under the names of `DiT`, and the unused keys with reasons."""

    state: dict[str, Tensor]
    ignored: dict[str, list[str]]


def transformer_of(state: State, system: str) -> OfficialTransformer:
    """Rename the keys of a released transformer, and turn its time and velocity to run from noise to data."""
    if system == "svg":
        return OfficialTransformer(dict(state), {})
    ignored: dict[str, list[str]] = {}
    projectors = [key for key in state if key.startswith(PROJECTORS[0])]
    if projectors and system == "repa":
        ignored[PROJECTORS[1]] = projectors
    if rotations := [key for key in state if key.startswith("feat_rope.")]:
        ignored[ROTATION_REASON] = rotations
    kept = {key: value for key, value in state.items() if key not in ignored.get(PROJECTORS[1], ())}
    if system == "repa":
        kept = _turned(numbered_through(kept))
    return OfficialTransformer(transformer_from_official(kept), ignored)


def numbered_through(state: State) -> dict[str, Tensor]:
    """Return the keys with blocks counted through: old files of REPA begin again after the aligned block."""
    depth = count(state, r"blocks\.(\d+)\.")
    return {
        f"blocks.{int(match[1]) + depth}.{key[match.end() :]}" if (match := LEGACY.match(key)) else key: value
        for key, value in state.items()
    }


def _turned(state: State) -> dict[str, Tensor]:
    """Return the weights of the same model with t → 1 - t and v → -v: REPA's noise is at t = 1.

    cos((1-t)w) = cos w cos tw + sin w sin tw and sin((1-t)w) = sin w cos tw - cos w sin tw, so the first layer on the
    time features takes in the change.
    """
    name = "t_embedder.mlp.0.weight"
    weight = state[name].double()
    half = weight.shape[1] // 2
    frequencies = time_frequencies(half).double()
    cos, sin = frequencies.cos(), frequencies.sin()
    of_cos, of_sin = weight[:, :half], weight[:, half:]
    turned = torch.cat([of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos], dim=1)
    final = {key: -state[key] for key in ("final_layer.linear.weight", "final_layer.linear.bias")}
    return {**state, name: turned.float(), **final}
