"""`svgpipe import-official`: convert released checkpoints to an autoencoder and a diffusion model.

OUT/autoencoder    SVG's: residual encoder, decoder, mask token and backbone. No alignment: the official code aligns
                   every batch by itself, so the first extraction or evaluation measures the four scalars.
                   SD-VAE, VA-VAE: encoder and decoder
OUT/diffusion      the transformer, with the official statistics of its latents
OUT/import.json    used and unused keys, with reasons

A key without a place is an error. No code in a file is run.
"""

from __future__ import annotations

import math
from pathlib import Path

from svgpipe.manifests.errors import UsageError
from svgpipe.manifests.filesystem import Location
from svgpipe.manifests.manifest import read_json, write_json

from .import_autoencoder import import_autoencoder
from .import_diffusion import DiffusionFiles, import_diffusion
from .imported import Imported

IMPORT_NAME = "import.json"


def import_official(
    autoencoder: Path, out: Location, *, diffusion: DiffusionFiles | None = None, image_size: int | None = None
) -> list[Imported]:
    """Convert official files; run again to find finished work.

    Args:
        autoencoder: Lightning checkpoint of SVG, or weights of SD-VAE or VA-VAE.
        out: directory for `autoencoder` and `diffusion`.
        diffusion: transformer on its latents; None: the autoencoder alone.
        image_size: pixels per side, for SD-VAE and VA-VAE; None: 256.

    Returns:
        One result per imported file.

    Raises:
        UsageError: what the files do not say was not given.
        ArtifactError: files that are missing, unsafe, of another system, or have unknown keys.
        MismatchError: `out` holds another import, or the latents of transformer and autoencoder differ in shape.
    """
    if diffusion is not None and diffusion.factor is not None:
        if diffusion.stats is not None:
            raise UsageError("--stats and --factor are two ways to normalise the latents: give one of them.")
        if not 0 < diffusion.factor < math.inf:
            raise UsageError(f"--factor: expected a positive number, found {diffusion.factor}.")
    imports = [import_autoencoder(autoencoder, out / "autoencoder", image_size)]
    if diffusion is not None:
        imports.append(import_diffusion(diffusion, out / "autoencoder", out / "diffusion"))
    listing = [{"directory": one.directory.name, "used": one.used, "ignored": one.ignored} for one in imports]
    now = {entry["directory"] for entry in listing}
    earlier = read_json(out / IMPORT_NAME)["imported"] if (out / IMPORT_NAME).exists() else []
    write_json(out / IMPORT_NAME, {"imported": listing + [one for one in earlier if one["directory"] not in now]})
    return imports
