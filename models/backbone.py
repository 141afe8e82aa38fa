"""The frozen feature extractor: any timm model as a map of patch features.

Shapes: B batch, C channels, H W pixels, h w grid rows and columns.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .convert import require_fit


@dataclass(frozen=True)
class Layers:
    """Blocks of a ViT whose outputs are combined, each after the model's final norm.

    Source: RAEv2 (arXiv 2605.18324), DINOv3MultiLayerSimpleAddEncoder in vision_encoder.py: mean with `spatial_mean`.
    Its norm has no weights. They cancel in a cache, which normalises every channel.

    Attributes:
        blocks: their numbers from 0; or how many of the last.
        combine: mean, or concat: the channels of all blocks, in the order of the model.
        spatial_mean: add the mean over the grid of the last of these blocks to every cell.
    """

    blocks: tuple[int, ...] | int
    combine: Literal["mean", "concat"] = "mean"
    spatial_mean: bool = False

    def numbers(self, depth: int) -> list[int]:
        """Return the numbers of the blocks of a model with `depth` blocks, in ascending order.

        Raises:
            ValueError: a block that does not exist.
        """
        if isinstance(self.blocks, int):
            if not 1 <= self.blocks <= depth:
                raise ValueError(f"last: expected 1..{depth} of its {depth} blocks, found {self.blocks}")
            return list(range(depth - self.blocks, depth))
        if bad := [block for block in self.blocks if not 0 <= block < depth]:
            raise ValueError(f"layers: expected numbers of its {depth} blocks, 0..{depth - 1}, found {bad[0]}")
        return sorted(self.blocks)


class Backbone(nn.Module):
    """A frozen timm model, always in eval mode: (B,3,H,W) in [0,1] → (B,C,h,w).

    A ViT gives its final normalised patch tokens without prefix tokens, or those of several blocks. A CNN gives one
    feature level. Images are resized to `input_size` if they differ, and normalised with the model's mean and std.
    Source of the use in SVG: official dino_decoder.py, encode().
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        *,
        input_size: int,
        feature_level: int | None = None,
        layers: Layers | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Build with random weights.

        Args:
            name: timm model name, with or without a pretrained tag.
            input_size: pixels per side the model sees.
            feature_level: index into timm's feature levels for CNNs; None for ViTs.
            layers: blocks of a ViT to combine; None: the last one.
            model_kwargs: passed to timm, for sizes other than the named one's.

        Raises:
            ValueError: timm does not know the name, or the level or a block does not exist or is missing.
        """
        super().__init__()
        try:
            cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
        except RuntimeError as error:
            raise ValueError(f"backbone: {error}") from error
        if not timm.is_model(name):
            near = ", ".join(difflib.get_close_matches(name.split(".")[0], timm.list_models(), 3)) or "none"
            raise ValueError(f"backbone: expected a timm model name, found {name!r}; similar names: {near}")
        self.name, self.input_size = name, input_size
        kwargs = dict(model_kwargs or {})
        architecture = name.split(".")[0]
        self.model = timm.create_model(architecture, pretrained=False, num_classes=0, **kwargs)
        self.is_vit = hasattr(self.model, "num_prefix_tokens")
        self._check_level(feature_level)
        self.feature_level = feature_level
        self.layers, self.blocks = layers, self._blocks(layers)
        cfg = cfg or self.model.pretrained_cfg
        cfg = cfg if isinstance(cfg, dict) else cfg.to_dict()
        self.register_buffer("mean", torch.tensor(cfg["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(cfg["std"]).view(1, 3, 1, 1), persistent=False)
        if self.is_vit and hasattr(self.model, "set_input_size") and not _is_dynamic(self.model):
            self.model.set_input_size(img_size=input_size)
        self.requires_grad_(False)
        self.train(False)

    def _check_level(self, level: int | None) -> None:
        if self.is_vit:
            if level is not None:
                raise ValueError(f"{self.name}: feature_level: expected null for a ViT, found {level}")
            return
        count = len(self.model.feature_info)
        if level is None or not -count <= level < count:
            raise ValueError(f"{self.name}: feature_level: expected {-count}..{count - 1} for this CNN, found {level}")

    def _blocks(self, layers: Layers | None) -> list[int]:
        """Return the numbers of the blocks to combine; none for the output of the whole model.

        Raises:
            ValueError: the model is a CNN or has no final norm, or a block does not exist.
        """
        if layers is None:
            return []
        if not self.is_vit:
            raise ValueError(f"{self.name}: layers: expected null for this CNN: its levels have different grids")
        norm = getattr(self.model, "norm", None)
        if not hasattr(self.model, "blocks") or isinstance(norm, nn.Identity | None):
            raise ValueError(
                f"{self.name}: layers: expected a model with blocks and a final norm of its tokens; this one has none, "
                "or normalises after pooling"
            )
        try:
            return layers.numbers(len(self.model.blocks))
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    def train(self, mode: bool = True) -> Backbone:
        """Stay in eval mode: DINOv3's RoPE and BatchNorm are random or drift in train mode."""
        del mode
        return super().train(False)

    @property
    def channels(self) -> int:
        """Channels of the feature map."""
        if self.is_vit:
            copies = len(self.blocks) if self.layers is not None and self.layers.combine == "concat" else 1
            return int(self.model.num_features) * copies
        return int(self.model.feature_info[self.feature_level]["num_chs"])

    @property
    def stride(self) -> int:
        """Input pixels per grid cell."""
        if self.is_vit:
            patch = self.model.patch_embed.patch_size
            return int(patch[0] if isinstance(patch, Sequence) else patch)
        return int(self.model.feature_info[self.feature_level]["reduction"])

    @property
    def grid(self) -> int:
        """Rows (= columns) of the feature map at `input_size`.

        Raises:
            ValueError: `input_size` is no multiple of the stride.
        """
        if self.input_size % self.stride:
            raise ValueError(
                f"{self.name}: input_size: expected a multiple of its stride {self.stride}, found {self.input_size}"
            )
        return self.input_size // self.stride

    def forward(self, images: Tensor) -> Tensor:
        """(B,3,H,W) in [0,1] → (B,C,h,w)."""
        return self.features(self.prepare(images))

    def prepare(self, images: Tensor) -> Tensor:
        """Resize to `input_size` (bicubic, antialiased) and normalise: (B,3,H,W) in [0,1] → same range as trained."""
        if images.shape[-2:] != (self.input_size, self.input_size):
            images = F.interpolate(
                images,
                (self.input_size, self.input_size),
                mode="bicubic",
                antialias=True,
                align_corners=False,
            )
        normalised = (images - self.mean) / self.std
        # CNN kernels are 1.7 times faster in this layout (EfficientNet-Lite0, float32, CPU).
        return normalised if self.is_vit else normalised.contiguous(memory_format=torch.channels_last)

    def features(self, normalised: Tensor) -> Tensor:
        """(B,3,H,W) already normalised, any H W the model takes → (B,C,h,w)."""
        if not self.is_vit:
            levels = self.model.forward_intermediates(normalised, indices=[self.feature_level], intermediates_only=True)
            # Back to the usual layout: GroupNorm's backward in the decoder is 20 times slower in the other one.
            return levels[0].contiguous()
        if self.layers is not None:
            return self._combined(normalised, self.layers)
        tokens = self.model.forward_features(normalised)[:, self.model.num_prefix_tokens :]
        rows, columns = normalised.shape[-2] // self.stride, normalised.shape[-1] // self.stride
        return tokens.transpose(1, 2).reshape(len(tokens), -1, rows, columns)

    def _combined(self, normalised: Tensor, layers: Layers) -> Tensor:
        """Return the combined blocks (B,C,h,w). Blocks after the last one of them do not run."""
        outputs = self.model.forward_intermediates(
            normalised, indices=self.blocks, norm=True, stop_early=True, intermediates_only=True
        )
        mean = outputs[-1].mean(dim=(2, 3), keepdim=True) if layers.spatial_mean else None
        if layers.combine == "concat":
            return torch.cat([output if mean is None else output + mean for output in outputs], dim=1)
        combined = torch.stack(outputs).mean(dim=0)
        return combined if mean is None else combined + mean

    def levels(self, images: Tensor, indices: Sequence[int]) -> list[Tensor]:
        """Intermediate feature maps at the images' own resolution: (B,3,H,W) in [0,1] → list of (B,C_i,h_i,w_i).

        A ViT of fixed size sees them resized.

        Raises:
            ValueError: a level that the model does not have.
        """
        count = len(self.model.blocks) if self.is_vit else len(self.model.feature_info)
        bad = [index for index in indices if not -count <= index < count]
        if bad:
            raise ValueError(f"{self.name}: levels: expected {-count}..{count - 1}, found {bad[0]}")
        fixed = self.is_vit and not _is_dynamic(self.model)
        normalised = self.prepare(images) if fixed else (images - self.mean) / self.std
        return list(self.model.forward_intermediates(normalised, indices=list(indices), intermediates_only=True))

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Load weights in timm's or Meta's DINOv3 keys, strictly.

        Meta keeps RoPE periods in bfloat16 and as part of the file; timm computes them in float32, so
        they are copied where present and otherwise rounded through bfloat16.

        Raises:
            ValueError: keys are missing, left over or of another shape, or the file has qkv biases that
                this timm variant would drop.
        """
        converted = dict(weights)
        periods = weights.get("rope_embed.periods")
        if "storage_tokens" in weights:
            biased = any(k.endswith("qkv.bias") and bool(v.any()) for k, v in weights.items())
            if biased and not any(k.endswith("q_bias") for k, _ in self.model.named_parameters()):
                raise ValueError(
                    f"{self.name}: this file has qkv biases, which the model has no place for; "
                    f"use the backbone {self.name.split('.')[0]}_qkvb"
                )
            from timm.models.eva import checkpoint_filter_fn

            with redirect_stdout(StringIO()):  # it prints the exception that it expects
                converted = checkpoint_filter_fn(converted, self.model)
        else:
            own = self.model.state_dict()  # some keep a norm below `head.` without a classifier too
            converted = {k: v for k, v in converted.items() if k in own or not _is_head(k)}
        native = self._size_of_positions(converted)
        if native is not None:
            # Learned position tables come at the size of their training; timm resamples them afterwards.
            self.model.set_input_size(img_size=native)
        self._load_strictly(converted)
        if native is not None:
            self.model.set_input_size(img_size=self.input_size)
        self._set_rope_periods(periods)

    def _size_of_positions(self, converted: Mapping[str, Tensor]) -> int | None:
        """Pixels per side that a learned position table in the weights is for, where it is not the model's own."""
        theirs, own = converted.get("pos_embed"), self.model.state_dict().get("pos_embed")
        if theirs is None or own is None or theirs.shape == own.shape or not hasattr(self.model, "set_input_size"):
            return None
        prefix = own.shape[1] - self.grid**2
        side = math.isqrt(max(0, theirs.shape[1] - prefix))
        return side * self.stride if side**2 + prefix == theirs.shape[1] else None

    def _load_strictly(self, converted: Mapping[str, Tensor]) -> None:
        require_fit(self.name, self.model.state_dict(), converted)
        self.model.load_state_dict(converted)

    def _set_rope_periods(self, periods: Tensor | None) -> None:
        rope = getattr(self.model, "rope", None)
        if rope is None or not hasattr(rope, "periods") or "dinov3" not in self.name:
            return
        if periods is None:
            periods = rope.periods.to(torch.bfloat16)
        rope.periods.copy_(periods.to(rope.periods))


def own_input(name: str) -> tuple[int, int | None]:
    """Pixels per side that a timm model was made for, and the feature level that `Backbone` wants of it: its last.

    Raises:
        ValueError: timm does not know the name, or its tag.
    """
    if not timm.is_model(name):
        raise ValueError(f"expected a timm model name, found {name!r}")
    with torch.device("meta"):
        model = timm.create_model(name.split(".")[0], pretrained=False, num_classes=0)
    try:
        cfg = timm.get_pretrained_cfg(name) or model.pretrained_cfg
    except RuntimeError as error:
        raise ValueError(f"{name}: {error}") from error
    size = cfg["input_size"] if isinstance(cfg, dict) else cfg.input_size
    return int(size[-1]), None if hasattr(model, "num_prefix_tokens") else -1


def _is_dynamic(model: nn.Module) -> bool:
    return bool(getattr(model, "dynamic_img_size", False))


def _is_head(key: str) -> bool:
    return key.startswith(("head.", "classifier.", "fc.", "head.fc."))
