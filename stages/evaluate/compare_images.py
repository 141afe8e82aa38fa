"""Compares reconstructions with their originals, image by image, on the workers: PSNR, SSIM, CIEDE2000, LPIPS."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.color import deltaE_ciede2000, rgb2lab
from skimage.metrics import structural_similarity

from svgpipe.manifests.autoencoder_section import PerceptualSection
from svgpipe.manifests.filesystem import Location, absolute
from svgpipe.manifests.index import ImageRef
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.manifest import Json, digest

from ..images.decode import CROP, RGBArray, psnr
from ..images.image_set import ImageSet
from ..images.tensors import as_unit_range
from ..networks.backbone import state_digest
from ..networks.perceptual import load_lpips
from ..runtime.progress import Progress
from ..runtime.runner import Runner, Steps
from .features import software

JOURNAL = "journal/measure"
Measures = dict[str, list[float | None]]


class Lpips(NamedTuple):
    """The weights of LPIPS, and the digest of its tensors."""

    files: PerceptualSection
    weights: str

    @classmethod
    def open(cls, vgg_weights: str, lpips_weights: str) -> Lpips:
        """Load it once, to check its weights.

        Returns:
            Its description.

        Raises:
            ArtifactError: a file is missing or does not fit, or cannot be downloaded.
        """
        vgg, lins = (str(Path(name).absolute()) if name != "hub" else name for name in (vgg_weights, lpips_weights))
        files = PerceptualSection(vgg_weights=vgg, lpips_weights=lins)
        return cls(files, state_digest(load_lpips(files, "reconstruction").state_dict()))


@dataclass(frozen=True)
class PairUnit:
    """Unit of work: some images and their originals. `key` is a digest of everything that determines the values."""

    number: int
    key: str
    originals: Sequence[ImageRef]
    images: Sequence[ImageRef]
    size: int


@dataclass(frozen=True)
class _Pairs:
    unit: PairUnit
    originals: RGBArray
    images: RGBArray


@dataclass(frozen=True)
class _Compared:
    unit: PairUnit
    measures: Measures


def compare_sets(
    out: Location,
    originals: ImageSet,
    sets: dict[str, ImageSet],
    unit_rows: int,
    lpips: Lpips | None,
    runner: Runner,
    progress: Progress,
) -> dict[str, Measures]:
    """Compare every set with the originals; run again to resume.

    Args:
        out: directory of the evaluation, which holds the journal.
        originals: real images.
        sets: their reconstructions by name.
        unit_rows: images per unit.
        lpips: None: not measured.
        runner: where images are compared.
        progress: receives the progress.

    Returns:
        Values by set and metric, in the order of the images; None for the infinite PSNR of an exact reproduction.
    """
    starts = range(0, len(originals), unit_rows)
    units = {
        name: [
            _unit(place * len(starts) + i, originals, images, range(start, start + unit_rows), lpips)
            for i, start in enumerate(starts)
        ]
        for place, (name, images) in enumerate(sets.items())
    }
    journal = Journal(out, JOURNAL)
    every = [unit for of_set in units.values() for unit in of_set]
    missing = [unit for unit in every if _kept(journal, unit) is None]
    total = len(sets) * len(originals)
    progress.begin("measure", total, "images", total - sum(len(unit.images) for unit in missing))
    for count in runner.run(missing, Steps(_read, _MakeWorker(lpips), _Write(absolute(out)))):
        progress.advance(count)
    return {name: _joined([journal.read(unit.number)["kept"] for unit in of_set]) for name, of_set in units.items()}


def _unit(number: int, originals: ImageSet, images: ImageSet, rows: range, lpips: Lpips | None) -> PairUnit:
    chosen = slice(rows.start, rows.stop)
    pair = [[replace(ref, tar=absolute(ref.tar)) for ref in one.refs[chosen]] for one in (originals, images)]
    shown = [ref.sha256 for refs in pair for ref in refs]
    key = digest([software(), CROP, originals.size, shown, None if lpips is None else lpips.weights])
    return PairUnit(number, key, pair[0], pair[1], originals.size)


def _kept(journal: Journal, unit: PairUnit) -> Json | None:
    record = journal.find(unit.number)
    return None if record is None or record.entry.get("key") != unit.key else record.entry


def _joined(parts: Sequence[Measures]) -> Measures:
    return {name: [value for part in parts for value in part[name]] for name in parts[0]} if parts else {}


def _read(unit: PairUnit) -> _Pairs:
    pixels = (ImageSet(refs, unit.size).all_pixels() for refs in (unit.originals, unit.images))
    return _Pairs(unit, *pixels)


@dataclass(frozen=True)
class _MakeWorker:
    """Builds the step that compares, with LPIPS on the device."""

    lpips: Lpips | None

    def __call__(self, device: torch.device) -> Callable[[_Pairs], _Compared]:
        distance = None if self.lpips is None else _distance(self.lpips, device)

        def compare_all(pairs: _Pairs) -> _Compared:
            measures: Measures = {}
            for original, image in zip(pairs.originals, pairs.images, strict=True):
                values = compare(original, image)
                if distance is not None:
                    values["lpips"] = distance(original, image)
                for name, value in values.items():
                    measures.setdefault(name, []).append(value if np.isfinite(value) else None)
            return _Compared(pairs.unit, measures)

        return compare_all


def _distance(lpips: Lpips, device: torch.device) -> Callable[[RGBArray, RGBArray], float]:
    model = load_lpips(lpips.files, "reconstruction").to(device)

    @torch.inference_mode()
    def distance(one: RGBArray, two: RGBArray) -> float:
        pair = [as_unit_range(pixels[None]).to(device) * 2 - 1 for pixels in (one, two)]
        return float(model(*pair))

    return distance


@dataclass(frozen=True)
class _Write:
    """Records the values of a unit."""

    out: Location

    def __call__(self, compared: _Compared) -> int:
        unit = compared.unit
        Journal(self.out, JOURNAL).record(unit.number, {"key": unit.key, "kept": compared.measures})
        return len(unit.images)


def compare(original: RGBArray, reconstruction: RGBArray) -> dict[str, float]:
    """Compare an image with its reconstruction, both (S,S,3) uint8; names as in `Reconstructed`.

    Returns:
        Metrics by name.
    """
    similarity = structural_similarity(
        original,
        reconstruction,
        data_range=255,
        channel_axis=2,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    colours: NDArray[np.float64] = deltaE_ciede2000(rgb2lab(original), rgb2lab(reconstruction))
    return {
        "psnr": float(psnr(original[None], reconstruction[None])[0]),
        "ssim": float(similarity),
        "colour_difference": float(colours.mean()),
    }
