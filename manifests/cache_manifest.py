"""The manifest of a feature cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from .feature_store import FeatureStore
from .manifest import Json, Manifest, digest
from .store_spec import Distribution, StoreDtype, StoreSpec

VISION_FROM = "vision_features_from"  # in `timings`: cache that vision features were copied from
STATISTICS = ("stored_mean", "stored_std", "stored_min", "stored_max", "stored_covariance")


class CacheManifest(Manifest):
    """What a feature cache holds and what it was made from."""

    KIND: ClassVar[str] = "feature-cache"
    NOUN: ClassVar[str] = "a feature cache"
    OUTSIDE_IDENTITY: ClassVar[frozenset[str]] = frozenset({"num_bytes", "timings"})
    ADDED: ClassVar[frozenset[str]] = frozenset({"distribution"})

    kind: Literal["feature-cache"] = "feature-cache"
    num_samples: int
    num_valid: int
    num_rejected: int
    num_heldout: int
    feature_shape: tuple[int, int, int] = Field(description="rows, columns, channels")
    frozen_channels: int
    views: list[str]
    store_dtype: StoreDtype = "float16"
    unit_rows: int
    class_names: list[str]
    backbone: str
    backbone_weights: str = Field(description="Weights as named in the recipe: hub, random, a file or a package.")
    content: str = Field(description="sha256 over the hashes of all outer shards, labels and statistics.")
    distribution: Distribution = Field(
        "point",
        description="gaussian: the first half of the channels holds means, the second half standard deviations of a "
        "VAE's posterior. Training draws latents from it.",
    )
    num_bytes: int
    timings: Json = Field(default_factory=dict, description="Seconds per worker of the run that finished the cache.")

    @property
    def spec(self) -> StoreSpec:
        """Shape of the store."""
        rows, columns, channels = self.feature_shape
        return StoreSpec(
            num_samples=self.num_samples,
            views=tuple(self.views),
            grid=(rows, columns),
            channels=channels,
            unit_rows=self.unit_rows,
            class_names=tuple(self.class_names),
            dtype=self.store_dtype,
        )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Rows, columns and channels of a latent: of `feature_shape`, or half of its channels for a posterior."""
        rows, columns, channels = self.feature_shape
        return rows, columns, channels // 2 if self.distribution == "gaussian" else channels

    @property
    def channel_groups(self) -> dict[str, slice]:
        """Channels of a latent by what made them: backbone and residual, a KL autoencoder (latent), or others."""
        channels = self.latent_shape[2]
        if not self.frozen_channels:
            return {"latent": slice(0, channels)}
        if "autoencoder" not in self.inputs:
            return {"features": slice(0, channels)}
        backbone = {"backbone": slice(0, self.frozen_channels)}
        return backbone | (
            {"residual": slice(self.frozen_channels, channels)} if self.frozen_channels < channels else {}
        )

    @property
    def array_names(self) -> list[str]:
        """Names of the small arrays of the store."""
        scale = ["feature_scale"] if self.store_dtype == "int8" else []
        return ["label", "valid", "heldout", "channel_mean", "channel_std", *scale, *STATISTICS]

    @staticmethod
    def content_of(store: FeatureStore, unit_hashes: Sequence[str]) -> str:
        """Return the expected value of `content`: a digest over all outer shards and the small arrays."""
        names = ["label", "valid", "heldout", "channel_mean", "channel_std"]
        if store.spec.dtype == "int8":
            names.append("feature_scale")
        return digest([list(unit_hashes), {name: digest(store.array(name).tolist()) for name in names}])
