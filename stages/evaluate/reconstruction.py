"""`svgpipe eval-reconstruction`: reconstruction of held-out images, with and without the residual branch.

decode    all sets of reconstructions into WebDataset tars, in units with a journal
measure   pairs of images, and sets of images, as 8-bit images
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from svgpipe.manifests.alignment import keep_alignment, require_same_alignment
from svgpipe.manifests.autoencoder_section import AutoencoderSection
from svgpipe.manifests.calibration import measured_calibration
from svgpipe.manifests.errors import ArtifactError, UsageError
from svgpipe.manifests.evaluation_section import ReconstructionSection
from svgpipe.manifests.filesystem import Location, absolute, file_sha256
from svgpipe.manifests.index import ImageRef
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.manifest import InputRef, Json, digest
from svgpipe.manifests.model_manifests import AutoencoderManifest
from svgpipe.manifests.reconstruction import Reconstructed, ReconstructionManifest, ReconstructionReport
from svgpipe.manifests.report_file import REPORT_NAME
from svgpipe.manifests.selection import choose_evenly
from svgpipe.manifests.shards import ShardSet, refs_of
from svgpipe.manifests.workdir import StageSpec, WorkDir

from ..extract.align import align_for_evaluation, needs_alignment
from ..extract.calibrate import measure_features
from ..extract.encoder_actor import EncoderOptions
from ..images.image_set import ImageSet
from ..networks.weight_files import read_weight_file
from ..runtime.progress import Progress, Recorded
from ..runtime.runner import LocalRunner, Runner
from .compare_images import Lpips, compare_sets
from .decode_latents import DecoderOptions, ImageJob, decode
from .extracted_features import extract_sets, extracted
from .features import POOLED, Extractor, extractor_for, software, weight_inputs
from .intervals import mean_estimate
from .measure_images import RECONSTRUCTIONS
from .metrics import Comparison, Features
from .reference import require_decodable, was_decoded

WITHOUT_RESIDUAL = "without-residual"
MIN_IMAGES = 2
DEVIATION_IMAGES = 512  # whose latents give the unit of the noise


@dataclass(frozen=True)
class ReconstructionPlan:
    """The plan of an evaluation of an autoencoder."""

    out: Location
    pool: Location  # holds `features`, which evaluations share
    config: ReconstructionSection
    autoencoder: Location
    encoder: AutoencoderManifest
    shards: ShardSet
    chosen: list[ImageRef]
    inputs: dict[str, InputRef]

    @classmethod
    def resolve(
        cls,
        autoencoder: Location,
        shards: ShardSet,
        out: Location,
        config: ReconstructionSection,
        pool: Location | None,
    ) -> ReconstructionPlan:
        """Choose the images.

        Returns:
            The plan.

        Raises:
            UsageError: fewer than two held-out images.
        """
        encoder, heldout = AutoencoderManifest.read(autoencoder), shards.usable("heldout")
        if len(heldout) < MIN_IMAGES:
            raise UsageError(
                f"{shards.directory}: expected at least {MIN_IMAGES} held-out images, found {len(heldout)}. Make the "
                "shards with --holdout: reconstruction is measured on images that were not used in training."
            )
        inputs = {
            "autoencoder": encoder.as_input(autoencoder),
            "shards": shards.as_input(),
            **weight_inputs(extractor=config.extractor.weights, vgg=config.vgg_weights, lpips=config.lpips_weights),
        }
        chosen = choose_evenly(heldout, config.num_images)
        return cls(out, pool or out.parent, config, autoencoder, encoder, shards, chosen, inputs)

    @property
    def section(self) -> AutoencoderSection:
        """Recipe section of the autoencoder."""
        return self.encoder.section

    @cached_property
    def extractor(self) -> Extractor:
        """The feature extractor.

        Raises:
            ArtifactError: weights are not available.
        """
        return extractor_for(self.config.extractor, self.encoder, self.autoencoder, "reconstruction.extractor")

    @property
    def originals(self) -> ImageSet:
        """The held-out images."""
        return ImageSet(self.chosen, self.encoder.image_size)

    def jobs(self) -> list[ImageJob]:
        """Return the sets to decode: plain; without the residual branch for kind svg; with noise on the latents."""
        whole = partial(ImageJob, count=len(self.chosen), originals=self.chosen)
        jobs = [whole(RECONSTRUCTIONS)]
        if self.section.kind == "svg":
            jobs.append(whole(WITHOUT_RESIDUAL, residual=False))
        return jobs + [whole(f"noise-{noise:g}", noise=noise) for noise in self.noise]

    @property
    def noise(self) -> tuple[float, ...]:
        """Deviations of noise on the latents; of a decoder that was trained with noise, the mean one."""
        if self.config.noise is not None:
            return self.config.noise
        return () if self.section.decoder_noise is None else (self.section.decoder_noise / 2,)

    def not_measured(self) -> list[str]:
        """Return what cannot be measured for this autoencoder, with the reason."""
        if self.section.kind == "svg" and self.section.residual.mask_ratio == 0:
            return ["a fair reconstruction without residual: it was never masked in training (mask_ratio 0)"]
        return []

    def decoder_options(self, deviation: NDArray[np.float32]) -> DecoderOptions:
        """Return options for un-normalised latents. `deviation`: (C,) of the channels, the unit of the noise."""
        config = self.config
        return DecoderOptions(
            self.autoencoder,
            mean=np.zeros_like(deviation),
            std=deviation,
            size=self.encoder.image_size,
            seed=config.seed,
            unit_rows=config.unit_rows,
            batch_size=config.batch_size,
        )


def eval_reconstruction(
    autoencoder: Location,
    shards: ShardSet,
    out: Location,
    config: ReconstructionSection,
    *,
    pool: Location | None = None,
    runner: Runner | None = None,
    progress: Progress | None = None,
) -> ReconstructionManifest:
    """Reconstruct held-out images, measure them and publish the evaluation at `out`; run again to resume.

    `batch_size` changes single pixels by rounding only.

    Args:
        autoencoder: finished autoencoder.
        shards: its held-out images are reconstructed. If the alignment of an imported autoencoder is not measured yet,
            its training images are used for that.
        out: directory to create or resume.
        config: section `reconstruction` of a recipe.
        pool: holds `features`, which evaluations share; None: the parent of `out`.
        runner: where units run; default: in this process.
        progress: receives the progress.

    Returns:
        The manifest of the evaluation.

    Raises:
        UsageError: no held-out images.
        ArtifactError: missing weights or images.
        MismatchError: `out` holds another evaluation.
    """
    plan = ReconstructionPlan.resolve(autoencoder, shards, out, config, pool)
    with WorkDir(StageSpec(out, ReconstructionManifest, config.model_dump(mode="json"), plan.inputs)) as work:
        require_same_alignment(autoencoder, out)
        if work.finished is not None:
            ReconstructionReport.require_published(out, work.finished.report)
            return work.finished
        return _evaluate(plan, work, runner or LocalRunner(), Recorded(progress, out))


def _evaluate(
    plan: ReconstructionPlan, work: WorkDir[ReconstructionManifest], runner: Runner, progress: Progress
) -> ReconstructionManifest:
    """Decode, then measure.

    Returns:
        The manifest.
    """
    config, out, missing = plan.config, plan.out, plan.not_measured()
    extractor = plan.extractor  # missing weights must stop the run before it decodes
    lpips = _lpips(config, missing)
    if not was_decoded(plan.shards):
        require_decodable(plan.chosen, Journal(out, "journal/looked"), progress)
    if needs_alignment(plan.autoencoder, plan.encoder):
        align_for_evaluation(plan.shards, plan.autoencoder, plan.encoder, config.batch_size, runner, progress)
    keep_alignment(plan.autoencoder, out)
    deviation = _deviation(plan, runner, progress) if plan.noise else np.ones(plan.encoder.channels, np.float32)
    tars = decode(plan.jobs(), plan.decoder_options(deviation), out, runner, progress)
    size = plan.encoder.image_size
    sets = {name: ImageSet(refs_of(out / "images" / name, shards), size) for name, shards in tars.items()}
    ReconstructionReport(
        inputs={name: ref.fingerprint for name, ref in plan.inputs.items()},
        software=software(),
        metric=extractor.metric,
        extractor=extractor.description,
        lpips_weights=None if lpips is None else lpips.weights,
        image_size=size,
        num_images=len(plan.chosen),
        images=plan.originals.digest,
        results=_measure(plan, sets, lpips, runner, progress),
        not_measured=missing,
    ).write(out)
    manifest = ReconstructionManifest(
        num_images=len(plan.chosen),
        content=digest({name: [tar.sha256 for tar in shards] for name, shards in tars.items()}),
        report=file_sha256(out / REPORT_NAME),
    )
    return work.publish(manifest)


def _deviation(plan: ReconstructionPlan, runner: Runner, progress: Progress) -> NDArray[np.float32]:
    """Return the deviation of every channel (C,) over the latents of some of the images, stored for a resume."""

    def measure() -> Json:
        rows = choose_evenly(plan.shards.usable_rows("heldout").tolist(), plan.config.num_images)
        chosen, size = choose_evenly(rows, DEVIATION_IMAGES), plan.encoder.image_size
        options = EncoderOptions(absolute(plan.autoencoder), plan.config.batch_size, "float32")
        total, _ = measure_features(plan.shards, chosen, size, options, runner, progress, "deviation")
        if plan.encoder.distribution == "point":
            return {"deviation": total.std.tolist()}
        calibration = measured_calibration(total, plan.encoder.distribution)
        return {"deviation": calibration.std[: plan.encoder.channels].tolist()}

    kept = Journal(plan.out, "journal/deviation").kept("deviation", plan.originals.digest, measure)
    return np.asarray(kept["deviation"], np.float32)


def _lpips(config: ReconstructionSection, missing: list[str]) -> Lpips | None:
    """Return LPIPS; None, and a line in `missing`, if its weights cannot be downloaded.

    Raises:
        ArtifactError: a file in the recipe is missing or does not fit, or the other file cannot be downloaded.
    """
    named = [Path(name) for name in (config.vgg_weights, config.lpips_weights) if name != "hub"]
    for path in named:
        read_weight_file(path)
    try:
        return Lpips.open(config.vgg_weights, config.lpips_weights)
    except ArtifactError as error:
        if named:
            raise
        missing.append(f"LPIPS: {error} (Use another output directory: this one stays as it is.)")
        return None


def _measure(
    plan: ReconstructionPlan, sets: dict[str, ImageSet], lpips: Lpips | None, runner: Runner, progress: Progress
) -> list[Reconstructed]:
    """Return the metrics of every set against the originals."""
    config, originals, pool = plan.config, plan.originals, plan.pool
    extract_sets(pool, [originals, *sets.values()], plan.extractor, config.batch_size, runner, progress)
    reference = extracted(pool, originals, plan.extractor, config.batch_size)
    comparison = Comparison(Features(reference[POOLED]), config.bootstrap, config.seed)
    values = compare_sets(plan.out, originals, sets, config.unit_rows, lpips, runner, progress)
    results = []
    noise_of = {job.name: job.noise or None for job in plan.jobs()}
    for name, images in sets.items():
        means = {
            key: mean_estimate(finite, config.bootstrap, config.seed) if len(finite := _finite(of_all)) else None
            for key, of_all in values[name].items()
        }
        features = extracted(pool, images, plan.extractor, config.batch_size)[POOLED]
        results.append(
            Reconstructed(
                name=name,
                residual=name != WITHOUT_RESIDUAL if plan.section.kind == "svg" else None,
                noise=noise_of.get(name),
                frechet_distance=comparison.frechet(features),
                kernel_distance=comparison.kernel(features),
                **{"lpips": None, **means},
            )
        )
    return results


def _finite(values: list[float | None]) -> Tensor:
    return torch.tensor([value for value in values if value is not None], dtype=torch.float64)
