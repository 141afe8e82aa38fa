"""`svgpipe eval-reconstruction`: what an autoencoder loses of held-out images, with its residual branch and without.

decode    both sets of reconstructions into WebDataset tars, on Ray workers, unit by unit with a journal
measure   image against image, and set against set, from the 8-bit images
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.color import deltaE_ciede2000, rgb2lab
from skimage.metrics import structural_similarity
from torch import Tensor

from svgpipe.manifests.alignment import keep_alignment, require_same_alignment
from svgpipe.manifests.checkpoint import AutoencoderManifest
from svgpipe.manifests.errors import ArtifactError, UsageError
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.manifest import WorkDir, digest
from svgpipe.manifests.recipe import AutoencoderSection, PerceptualSection, ReconstructionSection
from svgpipe.manifests.reconstruction import Reconstructed, ReconstructionManifest, ReconstructionReport
from svgpipe.manifests.report_file import REPORT_NAME
from svgpipe.manifests.shards import ShardSet, refs_of
from svgpipe.manifests.storage import Location, file_sha256

from ..extract.align import align_for_evaluation, needs_alignment
from ..images.decode import CROP, RGBArray, psnr
from ..images.image_set import ImageSet
from ..images.tensors import as_unit_range
from ..networks.autoencoder import build_backbone, read_weight_file, state_digest
from ..networks.perceptual import load_lpips
from ..runtime.device import pick_device
from ..runtime.progress import Progress, Recorded
from ..runtime.runner import Resources
from ..runtime.selection import evenly_spread
from .compare import RECONSTRUCTIONS, extracted
from .decode import ImageJob, decode
from .features import POOLED, Extractor, load_extractor, software, weight_inputs
from .intervals import mean_figure
from .metrics import Comparison, Features
from .reference import require_decodable, was_decoded

WITHOUT_RESIDUAL = "without-residual"
FEWEST = 2


class Lpips(NamedTuple):
    """LPIPS of two (S,S,3) uint8 images, and the digest of its tensors."""

    distance: Callable[[RGBArray, RGBArray], float]
    weights: str


def eval_reconstruction(
    autoencoder: Location,
    shards: ShardSet,
    out: Location,
    config: ReconstructionSection,
    *,
    pool: Location | None = None,
    resources: Resources | None = None,
    progress: Progress | None = None,
) -> ReconstructionManifest:
    """Reconstruct held-out images and publish what was measured at `out`; run again to resume. Ray must be connected.

    No number depends on `batch_size` but by the rounding of single pixels.

    Args:
        autoencoder: finished one.
        shards: whose held-out images are taken. By its training images the alignment of an imported autoencoder is
            measured, if nobody has yet.
        pool: holds `decoded` and `features`, which other evaluations find there; without it, where `out` lies.
    Raises:
        UsageError: no held-out images.
        ArtifactError: missing weights or images. MismatchError: `out` holds another evaluation.
    """
    resources = resources or Resources()
    encoder = AutoencoderManifest.read(autoencoder)
    heldout = shards.usable("heldout")
    if len(heldout) < FEWEST:
        raise UsageError(
            f"{shards.directory}: expected at least {FEWEST} held-out images, found {len(heldout)}. Make the shards "
            "with --holdout, so that reconstructions are measured on images that no training has seen."
        )
    chosen = [heldout[i] for i in evenly_spread(len(heldout), config.num_images)]
    inputs = {
        "autoencoder": encoder.as_input(autoencoder),
        "shards": shards.as_input(),
        **weight_inputs(extractor=config.extractor.weights, vgg=config.vgg_weights, lpips=config.lpips_weights),
    }
    with WorkDir(out, ReconstructionManifest, config.model_dump(mode="json"), inputs) as work:
        require_same_alignment(autoencoder, out)
        if work.finished is not None:
            ReconstructionReport.require_published(out, work.finished.report)
            return work.finished
        section = AutoencoderSection.model_validate(encoder.config)
        backbone = build_backbone(section.backbone, encoder.image_size, autoencoder)
        extractor = load_extractor(config.extractor, backbone, "reconstruction.extractor")
        missing: list[str] = []
        lpips = _lpips(config, missing)
        progress = Recorded(progress, out)
        if not was_decoded(shards):
            require_decodable(chosen, Journal(out / "journal" / "looked"), progress)
        if needs_alignment(autoencoder, encoder):
            align_for_evaluation(shards, autoencoder, encoder, config.batch_size, resources, progress)
        keep_alignment(autoencoder, out)
        jobs = [ImageJob(WITHOUT_RESIDUAL, len(chosen), originals=chosen, residual=False)]
        if encoder.residual_channels:
            jobs.insert(0, ImageJob(RECONSTRUCTIONS, len(chosen), originals=chosen))
            if section.residual.mask_ratio == 0:
                missing.append("a fair reconstruction without residual: it was never masked in training (mask_ratio 0)")
        else:
            missing.append("reconstructions with the residual branch on: this autoencoder has none")
        channels = encoder.frozen_channels + encoder.residual_channels
        tars = decode(
            jobs,
            autoencoder,
            out,
            pool=pool or out.parent,
            mean=np.zeros(channels, np.float32),
            std=np.ones(channels, np.float32),
            size=encoder.image_size,
            seed=config.seed,
            unit_rows=config.unit_rows,
            batch_size=config.batch_size,
            resources=resources,
            progress=progress,
        )
        originals = ImageSet(chosen, encoder.image_size)
        sets = {
            name: ImageSet(refs_of(out / "images" / name, shards_of), encoder.image_size)
            for name, shards_of in tars.items()
        }
        measured = Journal(out / "journal" / "measure")
        features = (pool or out.parent) / "features"
        results = _measure(originals, sets, extractor, lpips, measured, features, config, progress)
        report = ReconstructionReport(
            inputs={name: ref.fingerprint for name, ref in work.inputs.items()},
            software=software(),
            metric=extractor.metric,
            extractor=extractor.description,
            lpips_weights=None if lpips is None else lpips.weights,
            image_size=encoder.image_size,
            num_images=len(chosen),
            images=originals.digest,
            results=results,
            not_measured=missing,
        )
        report.write(out)
        return ReconstructionManifest(
            config=work.config,
            inputs=work.inputs,
            seconds=work.seconds,
            num_images=len(chosen),
            content=digest({name: [tar.sha256 for tar in found] for name, found in tars.items()}),
            report=file_sha256(out / REPORT_NAME),
        ).publish(out)


def _lpips(config: ReconstructionSection, missing: list[str]) -> Lpips | None:
    """LPIPS; None, and a line in `missing`, where weights from the hub cannot be had.

    Raises ArtifactError where a file was named, but is not there, does not fit, or the other one cannot be had.
    """
    named = [Path(name) for name in (config.vgg_weights, config.lpips_weights) if name != "hub"]
    for path in named:
        read_weight_file(path)
    weights = PerceptualSection(vgg_weights=config.vgg_weights, lpips_weights=config.lpips_weights)
    try:
        model = load_lpips(weights, "reconstruction").to(device := pick_device())
    except ArtifactError as error:
        if named:
            raise
        missing.append(f"LPIPS: {error} (In another --out: what is finished stays as it is.)")
        return None

    @torch.inference_mode()
    def distance(one: RGBArray, two: RGBArray) -> float:
        pair = [as_unit_range(pixels[None]).to(device) * 2 - 1 for pixels in (one, two)]
        return float(model(*pair))

    return Lpips(distance, state_digest(model.state_dict()))


def _measure(
    originals: ImageSet,
    sets: dict[str, ImageSet],
    extractor: Extractor,
    lpips: Lpips | None,
    journal: Journal,
    pool: Location,
    config: ReconstructionSection,
    progress: Progress,
) -> list[Reconstructed]:
    """Figures of every set; what was compared image by image is kept in `journal`, unit by unit."""
    reference = extracted(pool, originals, extractor, config.batch_size)
    comparison = Comparison(Features(reference[POOLED]), config.bootstrap, config.seed)
    progress.begin("measure", len(sets) * len(originals))
    results = []
    starts = range(0, len(originals), config.unit_rows)
    for number, (name, images) in enumerate(sets.items()):
        measures: dict[str, list[float | None]] = {}
        for part, start in enumerate(starts):
            rows = range(start, min(start + config.unit_rows, len(originals)))
            shown = [ref.sha256 for source in (originals, images) for ref in source.refs[start : rows.stop]]
            key = digest([software(), CROP, originals.size, shown, None if lpips is None else lpips.weights])
            compare = partial(_compare_all, originals, images, rows, lpips)
            for measure, values in journal.kept(number * len(starts) + part, key, compare).items():
                measures.setdefault(measure, []).extend(values)
            progress.advance(len(rows), name)
        figures = {
            key: mean_figure(kept, config.bootstrap, config.seed) if len(kept := _finite(values)) else None
            for key, values in measures.items()
        }
        features = extracted(pool, images, extractor, config.batch_size)[POOLED]
        results.append(
            Reconstructed(
                name=name,
                residual=name == RECONSTRUCTIONS,
                frechet_distance=comparison.frechet(features),
                kernel_distance=comparison.kernel(features),
                **{"lpips": None, **figures},
            )
        )
    return results


def _compare_all(
    originals: ImageSet, images: ImageSet, rows: Sequence[int], lpips: Lpips | None
) -> dict[str, list[float | None]]:
    """`_compare` of the images at `rows`; None for the infinite PSNR of one that is reproduced exactly."""
    found: dict[str, list[float | None]] = {}
    for row in rows:
        for key, value in _compare(originals.pixels(row), images.pixels(row), lpips).items():
            found.setdefault(key, []).append(value if np.isfinite(value) else None)
    return found


def _compare(original: RGBArray, found: RGBArray, lpips: Lpips | None) -> dict[str, float]:
    """One image against its reconstruction, both (S,S,3) uint8; names as in `Reconstructed`."""
    similarity = structural_similarity(
        original, found, data_range=255, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    colours: NDArray[np.float64] = deltaE_ciede2000(rgb2lab(original), rgb2lab(found))
    values = {
        "psnr": float(psnr(original[None], found[None])[0]),
        "ssim": float(similarity),
        "colour_difference": float(colours.mean()),
    }
    return values if lpips is None else {**values, "lpips": lpips.distance(original, found)}


def _finite(values: list[float | None]) -> Tensor:
    return torch.tensor([value for value in values if value is not None], dtype=torch.float64)
