"""What all self-contained HTML pages share: templates, pictures inside the page, lineage."""

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
    """One image with its caption; `data` is a URL that holds the image itself."""

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
    """A page from one of the templates beside this file; a value that is missing is an error."""
    folder = resources.files("svgpipe.pipeline")
    loader = jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text())
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, loader=loader)
    return environment.get_template(template).render(**values).encode()


# Pages are to be mailed and opened anywhere: a photograph of this size and quality takes about 15 kB of its page.
MAX_PICTURE, QUALITY = 256, 85


def picture(pixels: RGBArray, caption: str, *, lossless: bool = False) -> Picture:
    """(H,W,3) uint8 → WebP inside the page, at most MAX_PICTURE a side; feature maps are kept exactly."""
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    if not lossless:
        image.thumbnail((MAX_PICTURE, MAX_PICTURE), Image.Resampling.LANCZOS)
    image.save(buffer, "WEBP", quality=QUALITY, lossless=lossless)
    return Picture("data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode(), caption)


def lineage(ref: InputRef, name: str, depth: int = 0) -> list[tuple[int, str, InputRef]]:
    """This artifact and everything it was made from, depth first."""
    lines = [(depth, name, ref)]
    for child_name, child in ref.inputs.items():
        lines += lineage(child, child_name, depth + 1)
    return lines
