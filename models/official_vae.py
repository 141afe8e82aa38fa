"""Sizes and keys of released KL autoencoders: SD-VAE in diffusers' or CompVis's keys, VA-VAE.

`KLAutoencoder` has the names of CompVis, so that only those of diffusers are renamed. A convolution of size 1 and a
linear layer have the same weights in another shape.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from .convert import State
from .official import DecoderSizes, count, decoder_sizes, need

WHOLE_MODEL = "first_stage_model."  # prefix of the autoencoder in a file of Stable Diffusion
LEFT_ASIDE = {
    r"loss\..+": "LPIPS and discriminator, only needed for training",
    r"linear_proj\..+": "projection to the vision model, only needed for training",
    r"foundation_model\..+": "the vision model, only needed for training",
    r"model_ema\..+": "moving average of the training",
}
DIFFUSERS = [
    (r"coder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"coder.down.\1.downsample."),
    (r"coder\.down_blocks\.(\d+)\.resnets\.", r"coder.down.\1.block."),
    (r"coder\.down_blocks\.(\d+)\.attentions\.", r"coder.down.\1.attn."),
    (r"coder\.up_blocks\.(\d+)\.upsamplers\.0\.", r"coder.up.\1.upsample."),
    (r"coder\.up_blocks\.(\d+)\.resnets\.", r"coder.up.\1.block."),
    (r"coder\.up_blocks\.(\d+)\.attentions\.", r"coder.up.\1.attn."),
    (r"coder\.mid_block\.resnets\.0\.", r"coder.mid.block_1."),
    (r"coder\.mid_block\.resnets\.1\.", r"coder.mid.block_2."),
    (r"coder\.mid_block\.attentions\.0\.", r"coder.mid.attn_1."),
    (r"\.conv_shortcut\.", r".nin_shortcut."),
    (r"\.conv_norm_out\.", r".norm_out."),
    (r"(\.attn[_.]\d+)\.group_norm\.", r"\1.norm."),
    (r"(\.attn[_.]\d+)\.(?:to_q|query)\.", r"\1.q."),
    (r"(\.attn[_.]\d+)\.(?:to_k|key)\.", r"\1.k."),
    (r"(\.attn[_.]\d+)\.(?:to_v|value)\.", r"\1.v."),
    (r"(\.attn[_.]\d+)\.(?:to_out\.0|proj_attn)\.", r"\1.proj_out."),
]
ATTENTION = re.compile(r"\.attn[_.]\d+\.(q|k|v|proj_out)\.weight$")


@dataclass(frozen=True)
class OfficialKL:
    """Weights of a KL autoencoder under the names of `KLAutoencoder`, and the unused keys with reasons."""

    state: dict[str, Tensor]
    ignored: dict[str, list[str]]  # keys by reason
    sizes: DecoderSizes


def is_kl_autoencoder(state: State) -> bool:
    """Return whether a state dict looks like one: an encoder of convolutions."""
    return any(key.removeprefix(WHOLE_MODEL) == "encoder.conv_in.weight" for key in state)


def kl_from_official(state: State) -> OfficialKL:
    """Rename the keys of a released KL autoencoder.

    Files without the 1x1 convolutions at the latents (16-channel VAEs of diffusers) get the identity in their place.

    Raises:
        ValueError: a tensor is missing, or the latents have other channels than the decoder's input.
    """
    whole = any(key.startswith(WHOLE_MODEL) for key in state)
    ignored: dict[str, list[str]] = {}
    used: dict[str, Tensor] = {}
    for key, value in state.items():
        name = key.removeprefix(WHOLE_MODEL)
        reason = next((why for pattern, why in LEFT_ASIDE.items() if re.fullmatch(pattern, name)), None)
        if whole and not key.startswith(WHOLE_MODEL):
            reason = "other parts of the model in this file"
        if reason is not None:
            ignored.setdefault(reason, []).append(key)
        else:
            used[name] = value
    if any(".mid_block." in key for key in used):
        used = _from_diffusers(used)
    used = {key: value[:, :, None, None] if _is_flat(key, value) else value for key, value in used.items()}
    sizes = decoder_sizes({k.removeprefix("decoder."): v for k, v in used.items() if k.startswith("decoder.")})
    if "quant_conv.weight" not in used and "post_quant_conv.weight" not in used:
        used |= _identity("quant_conv", 2 * sizes.z_channels) | _identity("post_quant_conv", sizes.z_channels)
    channels = need(used, "post_quant_conv.weight", 4).shape[1]
    if channels != sizes.z_channels:
        raise ValueError(
            f"the latents have {channels} channels and the decoder's input {sizes.z_channels}; only equal numbers are "
            "supported"
        )
    return OfficialKL({key: value.float() for key, value in used.items()}, ignored, sizes)


def _from_diffusers(state: State) -> dict[str, Tensor]:
    """Rename diffusers' keys. Its lowest resolution is up_blocks.0, CompVis's the last of `up`."""
    levels = count(state, r"decoder\.up_blocks\.(\d+)\.")
    renamed = {}
    for key, value in state.items():
        name = key
        for pattern, replacement in DIFFUSERS:
            name = re.sub(pattern, replacement, name)
        renamed[re.sub(r"^decoder\.up\.(\d+)\.", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.", name)] = value
    return renamed


def _is_flat(key: str, value: Tensor) -> bool:
    """Return whether a weight of attention is linear, (C,C), instead of a convolution."""
    return ATTENTION.search(key) is not None and value.ndim == 2


def _identity(name: str, channels: int) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.eye(channels)[:, :, None, None], f"{name}.bias": torch.zeros(channels)}
