"""Sets of images by number, for extractors and pages."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from svgpipe.manifests.index import ImageRef
from svgpipe.manifests.manifest import digest

from .decode import CROP, RGBArray, centre_crop, decode_member, to_array


class ImageSet:
    """Images (S,S,3) uint8; ADM centre crops of larger images."""

    def __init__(self, refs: Sequence[ImageRef], size: int) -> None:
        self.refs, self.size = refs, size

    def __len__(self) -> int:
        return len(self.refs)

    def pixels(self, i: int) -> RGBArray:
        """Return (S,S,3) uint8."""
        ref = self.refs[i]
        image = decode_member(ref)
        return to_array(image if image.size == (self.size, self.size) else centre_crop(image, self.size))

    def all_pixels(self) -> RGBArray:
        """Return (n,S,S,3) uint8."""
        return np.stack([self.pixels(i) for i in range(len(self))])

    @property
    def labels(self) -> NDArray[np.int64]:
        """(n,) class indexes."""
        return np.asarray([ref.label for ref in self.refs], np.int64)

    @property
    def digest(self) -> str:
        """Digest of the bytes of the images and of their crop: the key of cached features."""
        return digest([CROP, self.size, [ref.sha256 for ref in self.refs]])
