"""What lies on disk between the stages: typed, fingerprinted, atomically written."""

from svgpipe.manifests.cache import CachedRow, FeatureCache

__all__ = ["CachedRow", "FeatureCache"]
