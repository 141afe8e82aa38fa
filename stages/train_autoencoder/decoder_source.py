"""What a decoder is fine-tuned from: a finished autoencoder, and a cache that its encoder made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from svgpipe.manifests.alignment import MeasuredAlignment, require_same_alignment
from svgpipe.manifests.autoencoder_section import AutoencoderSection
from svgpipe.manifests.cache import FeatureCache
from svgpipe.manifests.checkpoint import load_tensors, save_tensors
from svgpipe.manifests.errors import MismatchError, UsageError
from svgpipe.manifests.filesystem import Location, absolute
from svgpipe.manifests.manifest import InputRef, Json, differing_fields
from svgpipe.manifests.model_manifests import AUTOENCODER_FILE, BACKBONE_FILE, AutoencoderManifest, require_decoder
from svgpipe.manifests.shards import ShardSet

ENCODER_KEYS = ("residual", "kl", "vision_loss")  # of the autoencoder; the recipe's are not read
OF_THE_LATENTS = (
    "image_size",
    "grid",
    "frozen_channels",
    "residual_channels",
    "posterior_channels",
    "backbone_weights",
)


@dataclass(frozen=True)
class DecoderSource:
    """A finished autoencoder at `path`, and the cache that its encoder made."""

    path: Location
    manifest: AutoencoderManifest
    cache: FeatureCache

    @classmethod
    def open(cls, path: Location, cache: FeatureCache, shards: ShardSet) -> DecoderSource:
        """Return the autoencoder, and check that the cache holds its latents of the images in `shards`.

        Raises:
            MismatchError: it does not.
            UsageError: the cache does not say which images it holds.
            ArtifactError: the autoencoder is not finished.
        """
        what = "Give the autoencoder that extracted the cache."
        inputs = cache.manifest.inputs
        manifest = require_decoder(str(cache.path), inputs.get("autoencoder"), cache.manifest.latent_shape, path, what)
        require_same_alignment(path, cache.path)
        made_from, given = inputs.get("shards"), shards.as_input()
        if made_from is None:
            raise UsageError(
                f"{cache.path}: does not say which images it holds, because its features were computed elsewhere. Give "
                "a cache that svgpipe extract made."
            )
        if made_from.fingerprint != given.fingerprint:
            raise MismatchError(
                f"{cache.path}: was made from the shard set {made_from.fingerprint[:12]} ({made_from.path}), but got "
                f"{given.fingerprint[:12]} ({shards.directory}). Give the shard set that the cache was extracted from."
            )
        return cls(path, manifest, cache)

    def absolute(self) -> DecoderSource:
        """Return the same with absolute paths, for processes with another current directory."""
        return DecoderSource(absolute(self.path), self.manifest, FeatureCache(absolute(self.cache.path)))

    @property
    def inputs(self) -> dict[str, InputRef]:
        """References for the manifest of the fine-tuned autoencoder."""
        return {
            "cache": self.cache.manifest.as_input(self.cache.path),
            "autoencoder": self.manifest.as_input(self.path),
        }

    def section(self, config: AutoencoderSection) -> AutoencoderSection:
        """Return the config of the training: the architecture of the autoencoder, the centre crops of the cache.

        Without a vision model in the encoder, the recipe's is that of a perceptual loss.

        Raises:
            UsageError: the recipe has another kind, image size or decoder, or flips that the cache does not hold.
        """
        own = self.manifest.section
        there, here = (_shape_of_decoder(one) for one in (own, config))
        if lines := differing_fields(there, here):
            detail = "\n  ".join(lines)
            raise UsageError(f"{self.path}: has another decoder than the recipe. They differ in:\n  {detail}")
        if config.flip and not self.has_flips:
            raise UsageError(
                f"autoencoder.flip: {self.cache.path} holds no flipped images. Set autoencoder.flip=false, or extract "
                "with the view flip."
            )
        keys = (*ENCODER_KEYS, "backbone") if own.encodes_with_backbone else ENCODER_KEYS
        return config.model_copy(update={**{key: getattr(own, key) for key in keys}, "crop": "centre"})

    @property
    def has_flips(self) -> bool:
        """Whether the cache holds flipped images too."""
        return "flip" in self.cache.views

    def save(self, trained: dict[str, Tensor], out: Location) -> str:
        """Write the autoencoder with these decoder weights, and a backbone that lies beside it, to `out`.

        Returns:
            The sha256 of the weights.
        """
        state, alignment = self._weights(), self._alignment()
        if alignment is not None:
            state |= {"alignment.scalars": torch.tensor(alignment), "alignment.num_tracked": torch.tensor(1)}
        if self.manifest.section.encodes_with_backbone and (self.path / BACKBONE_FILE).exists():
            save_tensors(out / BACKBONE_FILE, load_tensors(self.path / BACKBONE_FILE))
        return save_tensors(out / AUTOENCODER_FILE, {**state, **trained})

    def described(self, content: str) -> dict[str, Any]:
        """Return the fields of a manifest for weights with this sha256: those of the latents are the autoencoder's."""
        return {
            **{name: getattr(self.manifest, name) for name in OF_THE_LATENTS},
            "alignment": self._alignment(),
            "content": content,
        }

    def _alignment(self) -> list[float] | None:
        """Return the alignment scalars; of an imported autoencoder those that the cache was made with."""
        measured = MeasuredAlignment.read(self.cache.path) or MeasuredAlignment.read(self.path)
        return self.manifest.alignment if measured is None else list(measured.scalars)

    def _weights(self) -> dict[str, Tensor]:
        return load_tensors(self.path / AUTOENCODER_FILE, self.manifest.content)

    @property
    def stored_shape(self) -> tuple[int, int, int]:
        """(V,h,w) of the values that the cache holds of an image."""
        rows, columns, values = self.cache.manifest.feature_shape
        return values, rows, columns

    def scaling(self) -> tuple[Tensor, Tensor]:
        """Return (V,) factor and offset: un-normalised value = stored * factor + offset."""
        factor, offset = self.cache.scaling
        return torch.from_numpy(factor.copy()), torch.from_numpy(offset.copy())

    def stored(self, rows: NDArray[np.int64], flipped: NDArray[np.bool_]) -> Tensor:
        """Return stored values (B,V,h,w), float16 or int8."""
        views = np.where(flipped, self.cache.views.index("flip"), 0) if self.has_flips else np.zeros(len(rows), int)
        return torch.from_numpy(self.cache.read_stored(rows, views)).permute(0, 3, 1, 2).contiguous()


def _shape_of_decoder(config: AutoencoderSection) -> Json:
    """Return what decides the weights of a decoder: with `vit`, the sizes of convolutions do not."""
    sizes = config.decoder
    decoder = {"vit": sizes.vit.model_dump()} if sizes.vit is not None else sizes.model_dump(mode="json")
    return {"kind": config.kind, "image_size": config.image_size, "decoder": decoder}
