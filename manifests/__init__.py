"""Files between the stages: typed, fingerprinted, written atomically."""

from .cache import CachedRow, FeatureCache

__all__ = ["CachedRow", "FeatureCache"]
