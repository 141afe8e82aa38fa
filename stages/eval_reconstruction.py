"""`svgpipe eval-reconstruction`: what an autoencoder loses of held-out images, with its residual branch and without.

decode    both sets of reconstructions into WebDataset tars, on Ray workers, unit by unit with a journal
measure   image against image, and set against set, from the 8-bit images
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.color import deltaE_ciede2000, rgb2lab
from skimage.metrics import structural_similarity
from torch import Tensor

from svgpipe.manifests.alignment import keep_alignment
from svgpipe.manifests.checkpoint import AutoencoderManifest
from svgpipe.manifests.errors import ArtifactError, UsageError
from svgpipe.manifests.manifest import WorkDir, digest
from svgpipe.manifests.recipe import AutoencoderSection, PerceptualSection, ReconstructionSection
from svgpipe.manifests.reconstruction import Reconstructed, ReconstructionManifest, ReconstructionReport
from svgpipe.manifests.report_file import REPORT_NAME
from svgpipe.manifests.shards import ShardSet, refs_of
from svgpipe.manifests.storage import Location, file_sha256
from svgpipe.stages.align import needs_alignment
from svgpipe.stages.comparison import RECONSTRUCTIONS, extracted
from svgpipe.stages.decoded_images import ImageJob, decode
from svgpipe.stages.encoder import build_backbone, read_weight_file
from svgpipe.stages.figures import mean_figure
from svgpipe.stages.images import RGBArray, psnr
from svgpipe.stages.measure import POOLED, Extractor, ImageSet, load_extractor, weight_inputs
from svgpipe.stages.metrics import Comparison, Features
from svgpipe.stages.perceptual import load_lpips
from svgpipe.stages.pixels import as_unit_range
from svgpipe.stages.progress import Progress, Recorded
from svgpipe.stages.selection import evenly_spread
from svgpipe.stages.training import pick_device
from svgpipe.stages.units import Resources

WITHOUT_RESIDUAL = "without-residual"
FEWEST = 2
Distance = Callable[[RGBArray, RGBArray], float]


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
        autoencoder: finished one. shards: whose held-out images are taken.
        pool: holds `features`, which other evaluations find there; without it, where `out` lies.
    Raises:
        UsageError: no held-out images, or an imported autoencoder that was never calibrated.
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
    if needs_alignment(autoencoder, encoder):
        raise UsageError(
            f"{autoencoder}: was imported, and its alignment was never measured. Run svgpipe extract with it first."
        )
    chosen = [heldout[i] for i in evenly_spread(len(heldout), config.num_images)]
    inputs = {
        "autoencoder": encoder.as_input(autoencoder),
        "shards": shards.as_input(),
        **weight_inputs(extractor=config.extractor.weights, vgg=config.vgg_weights, lpips=config.lpips_weights),
    }
    with WorkDir(out, ReconstructionManifest, config.model_dump(mode="json"), inputs) as work:
        keep_alignment(autoencoder, out)
        if work.finished is not None:
            return work.finished
        section = AutoencoderSection.model_validate(encoder.config)
        backbone = build_backbone(section.backbone, encoder.image_size, autoencoder)
        extractor = load_extractor(config.extractor, backbone, "reconstruction.extractor")
        missing: list[str] = []
        distance = _lpips(config, missing)
        progress = Recorded(progress, out)
        jobs = [ImageJob(RECONSTRUCTIONS, len(chosen), originals=chosen)]
        if encoder.residual_channels:
            jobs.append(ImageJob(WITHOUT_RESIDUAL, len(chosen), originals=chosen, residual=False))
            if section.residual.mask_ratio == 0:
                missing.append("a fair reconstruction without residual: it was never masked in training (mask_ratio 0)")
        else:
            missing.append("reconstructions without residual: this autoencoder has no residual branch")
        channels = encoder.frozen_channels + encoder.residual_channels
        tars = decode(
            jobs,
            autoencoder,
            out,
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
        results = _measure(originals, sets, extractor, distance, (pool or out.parent) / "features", config, progress)
        report = ReconstructionReport(
            metric=extractor.metric,
            extractor=extractor.description,
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


def _lpips(config: ReconstructionSection, missing: list[str]) -> Distance | None:
    """LPIPS of two 8-bit images; None, and a line in `missing`, where weights from the hub cannot be had.

    Raises ArtifactError for a file that was named and is not there, or damaged.
    """
    named = [Path(name) for name in (config.vgg_weights, config.lpips_weights) if name != "hub"]
    for path in named:
        read_weight_file(path)
    weights = PerceptualSection(vgg_weights=config.vgg_weights, lpips_weights=config.lpips_weights)
    try:
        model = load_lpips(weights, "reconstruction").to(device := pick_device())
    except ArtifactError as error:
        if len(named) == 2:
            raise
        missing.append(f"LPIPS: {error}")
        return None

    @torch.inference_mode()
    def distance(one: RGBArray, two: RGBArray) -> float:
        pair = [as_unit_range(pixels[None]).to(device) * 2 - 1 for pixels in (one, two)]
        return float(model(*pair))

    return distance


def _measure(
    originals: ImageSet,
    sets: dict[str, ImageSet],
    extractor: Extractor,
    distance: Distance | None,
    pool: Location,
    config: ReconstructionSection,
    progress: Progress,
) -> list[Reconstructed]:
    reference = extracted(pool, "heldout-originals", originals, extractor, config.batch_size)
    comparison = Comparison(Features(reference[POOLED]), config.bootstrap, config.seed)
    progress.begin("measure", len(sets) * len(originals))
    results = []
    for name, images in sets.items():
        measures: dict[str, list[float]] = {}
        for i in range(len(originals)):
            for key, value in _compare(originals.pixels(i), images.pixels(i), distance).items():
                measures.setdefault(key, []).append(value)
            progress.advance(1, name)
        figures = {
            key: mean_figure(kept, config.bootstrap, config.seed) if len(kept := _finite(values)) else None
            for key, values in measures.items()
        }
        features = extracted(pool, name, images, extractor, config.batch_size)[POOLED]
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


def _compare(original: RGBArray, found: RGBArray, distance: Distance | None) -> dict[str, float]:
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
    return values if distance is None else {**values, "lpips": distance(original, found)}


def _finite(values: list[float]) -> Tensor:
    """Without the infinite PSNR of images that are reproduced exactly."""
    return torch.tensor([value for value in values if np.isfinite(value)], dtype=torch.float64)
