"""Recognises official files by the names and shapes of their tensors.

Legend: D width, R residual channels.
Source: official train_svg.py, models_SVG.py, dino_decoder.py, main_svg_autoencoder.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from .convert import State

# The number of heads is not visible in the weights. It is fixed for the residual encoder. For transformers without
# QK-norm it follows from the published width.
RESIDUAL_HEADS = 8
DIT_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
PATCHES, HEAD_NORM = "x_embedder.proj.weight", "blocks.0.attn.q_norm.weight"
ROTATIONS = ("feat_rope.freqs_cos", "feat_rope.freqs_sin")
QKV_BIAS = "_qkvb"  # ends timm's name of a variant with these biases
DIT_NAMES = {(384, 12): "S", (768, 12): "B", (1024, 24): "L", (1152, 28): "XL"}
# (width, depth, SwiGLU) of Meta's DINOv3 ViTs → timm's architecture.
DINOV3 = {
    (192, 12, False): "vit_tiny_patch16_dinov3",
    (384, 12, False): "vit_small_patch16_dinov3",
    (384, 12, True): "vit_small_plus_patch16_dinov3",
    (768, 12, False): "vit_base_patch16_dinov3",
    (1024, 24, False): "vit_large_patch16_dinov3",
    (1280, 32, True): "vit_huge_plus_patch16_dinov3",
    (4096, 40, True): "vit_7b_patch16_dinov3",
}
IGNORED = {
    r"norm_vit\..+": "a LayerNorm that the official forward pass never calls",
    r"loss\..+": "LPIPS and discriminator, only needed for training",
    r"encoder\.mask_token": "DINOv3's mask token, only needed for its pretraining",
    r"encoder\.local_cls_norm\..+": "a LayerNorm of local crops, only needed for DINOv3's pretraining",
    r"encoder\.blocks\.\d+\.attn\.qkv\.bias_mask": "it keeps biases of keys at zero, which timm's model does itself",
}
NO_BIAS = "zero everywhere: distilled ViTs have no such bias"
# timm's converter would drop this silently.
NO_PLACE = re.compile(r"encoder\.(projectors\.|(?!rope_embed\.periods$).*rope)")
PARTS = ("encoder.", "extra_vit.", "decoder.")


@dataclass(frozen=True)
class OfficialAutoencoder:
    """The parts of an autoencoder's state dict, and the unused keys with reasons."""

    encoder: dict[str, Tensor]
    extra_vit: dict[str, Tensor]
    decoder: dict[str, Tensor]
    mask_token: Tensor  # (1,R,1)
    ignored: dict[str, list[str]]  # keys by reason


def split_autoencoder(state: State) -> OfficialAutoencoder:
    """Split the state dict of an official autoencoder into its parts.

    Raises:
        ValueError: an unknown key, a missing part, or an encoder of unknown size.
    """
    parts: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in PARTS}
    ignored: dict[str, list[str]] = {}
    unknown = []
    for key, value in state.items():
        part = next((p for p in PARTS if key.startswith(p)), None)
        reason = next((why for pattern, why in IGNORED.items() if re.fullmatch(pattern, key)), None)
        if reason is not None:
            ignored.setdefault(reason, []).append(key)
        elif part is not None and not NO_PLACE.match(key):
            parts[part][key.removeprefix(part)] = value
        elif key != "mask_token":
            unknown.append(key)
    if unknown:
        raise ValueError(f"{len(unknown)} keys have no place in an SVG autoencoder: {', '.join(unknown[:4])}")
    missing = [f"{prefix}*" for prefix, tensors in parts.items() if not tensors]
    missing += [] if "mask_token" in state else ["mask_token"]
    if missing:
        raise ValueError(f"not an SVG autoencoder: it has no {', '.join(missing)}")
    encoder = parts["encoder."]
    if not backbone_name(encoder).endswith(QKV_BIAS):
        zero = [key for key in encoder if key.endswith("qkv.bias")]
        ignored.update({NO_BIAS: [f"encoder.{key}" for key in zero]} if zero else {})
        encoder = {key: value for key, value in encoder.items() if key not in zero}
    return OfficialAutoencoder(encoder, parts["extra_vit."], parts["decoder."], state["mask_token"], ignored)


def backbone_name(state: State) -> str:
    """Return timm's name of a DINOv3 ViT with weights in Meta's keys.

    Raises:
        ValueError: other weights, or a size that timm does not know.
    """
    if "storage_tokens" not in state or "cls_token" not in state:
        raise ValueError("encoder: expected a DINOv3 ViT in Meta's keys (cls_token, storage_tokens, …)")
    width, depth = need(state, "cls_token", 3).shape[-1], count(state, r"blocks\.(\d+)\.")
    swiglu = "blocks.0.mlp.w1.weight" in state
    if (width, depth, swiglu) not in DINOV3:
        raise ValueError(
            f"encoder: no DINOv3 ViT of width {width}, depth {depth}{' with SwiGLU' if swiglu else ''} is known"
        )
    biased = any(key.endswith("qkv.bias") and bool(value.any()) for key, value in state.items())
    name = DINOV3[width, depth, swiglu]
    return f"{name}{QKV_BIAS}" if biased or width == 192 else name  # the smallest model exists only in this variant


def residual_sizes(state: State) -> dict[str, int | float]:
    """Return the sizes of the residual encoder: image_size, patch_size, channels, depth, width, heads, mlp_ratio.

    Raises:
        ValueError: a tensor is missing, or the number of positions is not a square.
    """
    patches, positions = need(state, "conv_proj.weight", 4), need(state, "encoder.pos_embedding", 3)
    width, patch, side = patches.shape[0], patches.shape[-1], math.isqrt(positions.shape[1] - 1)
    if side**2 != positions.shape[1] - 1:
        raise ValueError(f"extra_vit: expected positions of a square grid and a class, found {positions.shape[1]}")
    hidden = need(state, "encoder.layers.encoder_layer_0.mlp.0.weight", 2).shape[0]
    return {
        "image_size": side * patch,
        "patch_size": patch,
        "channels": need(state, "heads.2.weight", 2).shape[0],
        "depth": count(state, r"encoder\.layers\.encoder_layer_(\d+)\."),
        "width": width,
        "heads": RESIDUAL_HEADS,
        "mlp_ratio": hidden / width,
    }


@dataclass(frozen=True)
class DecoderSizes:
    """Sizes of the LDM decoder."""

    z_channels: int
    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    attention: bool


def decoder_sizes(state: State) -> DecoderSizes:
    """Return the sizes of a decoder.

    Raises:
        ValueError: a tensor is missing, or a width is not a multiple of the narrowest one.
    """
    levels = count(state, r"up\.(\d+)\.")
    widths = [need(state, f"up.{level}.block.0.conv2.weight", 4).shape[0] for level in range(levels)]
    ch = widths[0]
    if any(width % ch for width in widths):
        raise ValueError(f"decoder: expected widths that are multiples of {ch}, found {widths}")
    return DecoderSizes(
        z_channels=need(state, "conv_in.weight", 4).shape[1],
        ch=ch,
        ch_mult=tuple(width // ch for width in widths),
        num_res_blocks=count(state, r"up\.0\.block\.(\d+)\.") - 1,
        attention=f"up.{levels - 1}.attn.0.q.weight" in state,
    )


@dataclass(frozen=True)
class DiTSizes:
    """Sizes and options of a diffusion transformer."""

    grid: int
    in_channels: int
    num_classes: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float
    qk_norm: bool
    learn_sigma: bool
    patch_size: int | None = None
    rms_norm: bool = False
    swiglu: bool = False
    rope: bool = False

    @property
    def name(self) -> str:
        """S, B, L or XL for published sizes."""
        return DIT_NAMES.get((self.width, self.depth), f"of width {self.width} and depth {self.depth}")


def dit_sizes(state: State, heads: int | None = None) -> DiTSizes:
    """Return the sizes of an official SVG, DiT, SiT, REPA or LightningDiT transformer.

    The last row of its label table is assumed to be the null label. `heads` is the number of attention heads; None: as
    a tensor or the published width says.

    Raises:
        ValueError: a tensor is missing, the grid is not square, or the number of heads is unknown for this width.
    """
    table, positions = need(state, "y_embedder.embedding_table.weight", 2), need(state, "pos_embed", 3)
    out, side = need(state, "final_layer.linear.weight", 2).shape[0], math.isqrt(positions.shape[1])
    if PATCHES in state:
        width, channels, patch, _ = need(state, PATCHES, 4).shape
    else:
        (width, channels), patch = need(state, "ln1.weight", 2).shape, 1
    if side**2 != positions.shape[1]:
        raise ValueError(f"pos_embed: expected a square grid, found {positions.shape[1]} positions")
    once = patch**2 * channels
    if out not in (once, 2 * once):
        raise ValueError(f"final_layer: expected {once} or {2 * once} outputs, found {out}")
    swiglu = "blocks.0.mlp.w12.weight" in state
    hidden = need(state, "blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc2.weight", 2).shape[1]
    return DiTSizes(
        grid=side * patch,
        in_channels=channels,
        num_classes=table.shape[0] - 1,
        width=width,
        depth=count(state, r"blocks\.(\d+)\."),
        heads=heads or _heads(state),
        mlp_ratio=hidden * (1.5 if swiglu else 1) / width,
        qk_norm=HEAD_NORM in state,
        learn_sigma=out == 2 * once,
        patch_size=None if patch == 1 else patch,
        rms_norm="blocks.0.norm1.weight" in state,
        swiglu=swiglu,
        rope=ROTATIONS[0] in state,
    )


def heads_of(state: State) -> tuple[int, int | None]:
    """Return the width of a transformer, and its number of heads: from the width of a head, or a published one.

    None: no tensor shows it, and the width is not a published one. Raises ValueError for a missing tensor.
    """
    width = need(state, "y_embedder.embedding_table.weight", 2).shape[1]
    if HEAD_NORM in state:
        return width, width // need(state, HEAD_NORM, 1).shape[0]
    if ROTATIONS[0] in state:
        return width, width // need(state, ROTATIONS[0], 2).shape[1]
    return width, DIT_HEADS.get(width)


def _heads(state: State) -> int:
    """Return the number of heads.

    Raises:
        ValueError: it is unknown.
    """
    width, heads = heads_of(state)
    if heads is None:
        raise ValueError(f"width {width} is not a published one; without QK-norm the number of heads is unknown")
    return heads


def need(state: Mapping[str, Tensor], key: str, dimensions: int) -> Tensor:
    """Return a tensor of a state dict.

    Raises:
        ValueError: it is missing, empty, or has another number of dimensions.
    """
    if key not in state:
        raise ValueError(f"missing {key}")
    if state[key].ndim != dimensions or not state[key].numel():
        raise ValueError(f"{key}: expected {dimensions} dimensions of something, found {tuple(state[key].shape)}")
    return state[key]


def count(state: Mapping[str, Tensor], pattern: str) -> int:
    """Return one more than the largest number in the keys that begin with the pattern; 0 if there are none."""
    return 1 + max((int(match[1]) for key in state if (match := re.match(pattern, key))), default=-1)
