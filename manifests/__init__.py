"""What lies on disk between the stages: typed, fingerprinted, atomically written."""

from .cache import CachedRow, FeatureCache

__all__ = ["CachedRow", "FeatureCache"]
