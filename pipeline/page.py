"""Shared parts of the HTML pages: templates, embedded pictures, lineage."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
from PIL import Image

from svgpipe.manifests.manifest import InputRef
from svgpipe.stages.images.decode import RGBArray


@dataclass(frozen=True)
class Picture:
    """One image with its caption. `data` is a data URL."""

    data: str
    caption: str


@dataclass(frozen=True)
class Grid:
    """A titled grid of pictures."""

    title: str
    note: str
    columns: int
    pictures: list[Picture]


def render(template: str, **values: Any) -> bytes:
    """Return a page made from a template in this folder. A missing value is an error."""
    folder = resources.files("svgpipe.pipeline")
    loader = jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text())
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, loader=loader)
    return environment.get_template(template).render(**values).encode()


# Pages are sent by mail. A photograph of this size and quality takes about 15 kB.
MAX_PICTURE, QUALITY = 256, 85


def picture(pixels: RGBArray, caption: str, *, lossless: bool = False, largest: int = MAX_PICTURE) -> Picture:
    """Convert (H,W,3) uint8 to an embedded WebP of at most `largest` pixels per side. Feature maps are lossless.

    Returns:
        The picture with its caption.
    """
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    if not lossless:
        image.thumbnail((largest, largest), Image.Resampling.LANCZOS)
    image.save(buffer, "WEBP", quality=QUALITY, lossless=lossless)
    return Picture(webp_url(buffer.getvalue()), caption)


def webp_url(webp: bytes) -> str:
    """Return a data URL of an image."""
    return "data:image/webp;base64," + base64.b64encode(webp).decode()


def lineage(ref: InputRef, name: str, depth: int = 0) -> list[tuple[int, str, InputRef]]:
    """Return an artifact and all its inputs, depth first."""
    lines = [(depth, name, ref)]
    for child_name, child in ref.inputs.items():
        lines += lineage(child, child_name, depth + 1)
    return lines
