"""Tensors become 8-bit pixels by rounding to the nearest level; all metrics use these pixels."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from svgpipe.stages.images.decode import RejectedImageError, decode_image
from svgpipe.stages.images.tensors import as_pixels, as_unit_range

LEVELS = torch.arange(256, dtype=torch.float64)


@pytest.mark.parametrize("off", [-0.49, -0.1, 0.0, 0.1, 0.49])
def test_pixels_are_rounded_to_the_nearest_level(off: float) -> None:
    images = ((LEVELS + off) / 127.5 - 1).float().view(1, 1, 16, 16).expand(1, 3, 16, 16)
    found = as_pixels(images)
    assert found.shape == (1, 16, 16, 3) and found.dtype == np.uint8
    np.testing.assert_array_equal(found[0, ..., 1].ravel(), np.arange(256))


def test_pixels_out_of_range_are_clipped() -> None:
    images = torch.tensor([-9.0, -1.01, 1.01, 9.0]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert as_pixels(images)[0, ..., 0].tolist() == [[0, 0], [255, 255]]
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    np.testing.assert_array_equal(as_pixels(as_unit_range(pixels) * 2 - 1), pixels)


def test_a_png_with_one_wrong_bit_is_rejected() -> None:
    """Its chunks and its compressed data have checksums."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(buffer, "PNG")
    whole = buffer.getvalue()
    decode_image(whole)
    for place in range(100, len(whole) - 100, 1000):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        with pytest.raises(RejectedImageError, match="undecodable: broken data stream"):
            decode_image(bytes(flipped))


def test_transparent_grey_of_16_bits_becomes_white() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.array([[0, 257], [65535, 0]], np.uint16)).save(buffer, "PNG", transparency=0)
    found = np.asarray(decode_image(buffer.getvalue()))[..., 0]
    assert found.tolist() == [[255, 1], [255, 255]]
