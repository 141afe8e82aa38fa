"""Converts key names of official files, and weights of other packages that match by order.

Transformers and discriminators keep the official names. A key without a rule is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

State = Mapping[str, Tensor]

_RESIDUAL_RULES: list[tuple[str, str]] = [
    (r"class_token", "vit.cls_token"),
    (r"conv_proj\.(weight|bias)", r"vit.patch_embed.proj.\1"),
    (r"encoder\.pos_embedding", "vit.pos_embed"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.ln_(\d)\.(weight|bias)", r"vit.blocks.\1.norm\2.\3"),
    (
        r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj_(weight|bias)",
        r"vit.blocks.\1.attn.qkv.\2",
    ),
    (
        r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_proj\.(weight|bias)",
        r"vit.blocks.\1.attn.proj.\2",
    ),
    (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.0\.(weight|bias)", r"vit.blocks.\1.mlp.fc1.\2"),
    (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.3\.(weight|bias)", r"vit.blocks.\1.mlp.fc2.\2"),
    (r"encoder\.ln\.(weight|bias)", r"vit.norm.\1"),
    (r"heads\.(0|2)\.(weight|bias)", r"head.\1.\2"),
]


def residual_from_official(state: State) -> dict[str, Tensor]:
    """Rename torchvision VisionTransformer keys (prefix extra_vit. removed) to those of ResidualEncoder."""
    return {_rename(key, _RESIDUAL_RULES): value for key, value in state.items()}


def decoder_from_official(state: State) -> dict[str, Tensor]:
    """Rename official Decoder keys (prefix decoder. removed) to those of Decoder: the same names, in float32."""
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def transformer_from_official(state: State) -> dict[str, Tensor]:
    """Rename the keys of a DiT, SiT or LightningDiT to those of `DiT`. The tables of rotations are left out.

    The convolution over patches (D,C,p,p) becomes a linear layer (D, C p p).
    """
    return {
        key.replace("x_embedder.proj.", "ln1."): value.flatten(1) if key == "x_embedder.proj.weight" else value
        for key, value in state.items()
        if not key.startswith("feat_rope.")
    }


def in_order(state: State, own: State) -> dict[str, Tensor]:
    """Match weights of the same model from another package by order. Shapes must be equal.

    Raises:
        ValueError: another number of tensors, or a shape that differs.
    """
    if len(state) != len(own):
        raise ValueError(f"weights by order: expected {len(own)} tensors, found {len(state)}")
    matched = {}
    for (own_key, own_value), (key, value) in zip(own.items(), state.items(), strict=True):
        if own_value.shape != value.shape:
            raise ValueError(
                f"weights by order: {own_key}: expected {tuple(own_value.shape)}, found {tuple(value.shape)} ({key})"
            )
        matched[own_key] = value
    return matched


def misfits(own: State, theirs: State) -> list[str]:
    """Return one line per problem that prevents `theirs` from being loaded as `own`.

    Missing and additional keys, other shapes, other kinds of numbers, and numbers that are not finite.
    """
    problems = [f"missing {k}" for k in own if k not in theirs]
    problems += [f"left over {k}" for k in theirs if k not in own]
    return problems + [
        f"{k}: expected {expected}, found {found}"
        for k, v in theirs.items()
        if k in own
        for expected, found in _differences(own[k], v)
    ]


def _differences(own: Tensor, theirs: Tensor) -> Iterator[tuple[str, str]]:
    if own.shape != theirs.shape:
        yield str(tuple(own.shape)), str(tuple(theirs.shape))
    elif own.is_floating_point() != theirs.is_floating_point():
        yield str(own.dtype), str(theirs.dtype)
    elif own.is_floating_point() and not theirs.float().isfinite().all():
        yield "finite numbers", f"{int((~theirs.float().isfinite()).sum())} others"


def require_fit(name: str, own: State, theirs: State) -> None:
    """Check that `theirs` can be loaded as `own`.

    Raises:
        ValueError: there are `misfits`; the message has the first ones.
    """
    if problems := misfits(own, theirs):
        shown = "; ".join(problems[:4]) + ("; …" if len(problems) > 4 else "")
        raise ValueError(f"{name}: {len(problems)} weights do not fit: {shown}")


def _rename(key: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        if re.fullmatch(pattern, key):
            return re.sub(pattern, replacement, key)
    raise ValueError(f"official weights: the key {key!r} has no place in this model")
