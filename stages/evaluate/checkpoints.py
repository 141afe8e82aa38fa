"""`svgpipe evaluate-checkpoints`: distances of samples of every checkpoint of a training, without guidance.

OUT/journal/                    one record per checkpoint: a later run measures new checkpoints only
OUT/samples/step-00005000.png   some samples, with the same noise for every checkpoint
OUT/work/                       latents, images and features of the checkpoint that is measured, removed afterwards
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial

import numpy as np
from PIL import Image
from torch import Tensor

from svgpipe.manifests.cache import FeatureCache
from svgpipe.manifests.checkpoint import CheckpointStore
from svgpipe.manifests.checkpoint_curve import CURVE_NAME, CheckpointCurve, CheckpointPoint, epochs_to
from svgpipe.manifests.errors import ArtifactError, MismatchError
from svgpipe.manifests.estimate import Estimate
from svgpipe.manifests.evaluation_section import EvaluationSection
from svgpipe.manifests.filesystem import Location, make_directory, remove_tree, write_atomic
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.lock import locked
from svgpipe.manifests.manifest import MANIFEST_NAME, Json, digest, write_json
from svgpipe.manifests.model_manifests import AutoencoderManifest, require_decoder
from svgpipe.manifests.selection import evenly_spread

from ..images.image_set import ImageSet
from ..networks.diffusion import TrainedDiffusion, open_diffusion
from ..networks.guided_model import GuidedModel
from ..networks.sampling import SamplerSettings
from ..runtime.progress import Progress, Silent
from ..runtime.runner import LocalRunner, Runner
from .decode_latents import DecoderOptions, ImageJob, decode, decoded_images
from .extracted_features import extracted
from .features import POOLED, Extractor, extractor_for, software
from .metrics import FrechetMetric
from .reference import RealSets, Reference, require_extractor
from .sample_latents import Sweep, sample_sweep

SHOWN = 10  # samples per checkpoint, one of each class
SAMPLES = "samples"


def evaluate_checkpoints(
    run: Location,
    cache: FeatureCache,
    autoencoder: Location,
    reference: Reference,
    out: Location,
    config: EvaluationSection,
    *,
    pool: Location | None = None,
    distances: Sequence[float] = (),
    runner: Runner | None = None,
    progress: Progress | None = None,
) -> CheckpointCurve:
    """Measure all checkpoints of a training, finished or not, and write the curve to `out`; run again to resume.

    Args:
        run: directory of the diffusion model.
        cache: that it is trained on.
        autoencoder: that extracted the cache.
        reference: real images or statistics.
        out: directory to create or to continue.
        config: section `evaluation` of a recipe; without guidance, with the largest of its numbers of steps.
        pool: holds `features` of the real images, which evaluations share; None: the parent of `out`.
        distances: the curve says how many epochs the training takes to each of them.
        runner: where units run; default: in this process.
        progress: receives the progress.

    Returns:
        The curve.

    Raises:
        ArtifactError: there is no checkpoint, or weights are missing.
        MismatchError: the cache or the autoencoder is another one.
        UsageError: the checkpoints have no such weights, or statistics are of another extractor.
        BusyError: another process works in `out`.
    """
    models = _checkpoints(run, cache)
    shape = (*models[0].grid, models[0].channels)
    advice = "Give the autoencoder that extracted the cache."
    recorded = cache.manifest.inputs.get("autoencoder")
    encoder = require_decoder(str(cache.path), recorded, shape, autoencoder, advice)
    config = config.model_copy(update=_UNGUIDED | {"steps": (max(config.steps),)})
    shown = progress or Silent()
    work = _Curve(
        cache, autoencoder, encoder, reference, out, pool or out.parent, config, runner or LocalRunner(), shown
    )
    work.require(models)
    make_directory(out)
    with locked(out):
        journal = Journal(out)
        points = []
        for model in models:
            kept = journal.kept(model.step, work.key(model), partial(work.measured, model))
            points.append(CheckpointPoint.model_validate(kept))
            value = points[-1].frechet_distance.value
            shown.say(f"step {model.step} ({points[-1].epochs:.3g} epochs): Fréchet distance {value:.4g}")
        curve = work.curve(points, models[-1], distances)
        write_json(out / CURVE_NAME, curve.model_dump(mode="json"))
    return curve


_UNGUIDED = {
    "guidance": (1.0,),
    "internal_guidance": False,
    "guidance_mode": "constant",
    "guidance_channels": None,
    "seeds": None,
    "spaces": None,
    "spatial_distance": False,
}


def _checkpoints(run: Location, cache: FeatureCache) -> list[TrainedDiffusion]:
    """Return the checkpoints of a run and, if it is finished, its final model, by step.

    Raises:
        ArtifactError: there is none.
        MismatchError: they were trained on another cache.
    """
    models = [open_diffusion(folder) for folder in CheckpointStore(run / "checkpoints").folders()]
    if (run / MANIFEST_NAME).exists():
        final = open_diffusion(run)
        models = [*(model for model in models if model.step < final.step), final]
    if not models:
        raise ArtifactError(
            f"{run}: expected a diffusion model with checkpoints, found none. Train with diffusion.keep_every to keep "
            "them."
        )
    if models[0].cache != cache.manifest.fingerprint:
        raise MismatchError(
            f"{run}: was trained on the cache {models[0].cache[:12]}, but {cache.path} is "
            f"{cache.manifest.fingerprint[:12]}. Give the cache of the training."
        )
    return models


@dataclass(frozen=True)
class _Curve:
    """Everything but the checkpoints: how they are sampled, decoded and measured."""

    cache: FeatureCache
    autoencoder: Location
    encoder: AutoencoderManifest
    reference: Reference
    out: Location
    pool: Location
    config: EvaluationSection
    runner: Runner
    progress: Progress

    @cached_property
    def extractor(self) -> Extractor:
        """The feature extractor, loaded when first needed."""
        return extractor_for(self.config.extractor, self.encoder, self.autoencoder)

    @cached_property
    def real(self) -> RealSets:
        """The real images."""
        return RealSets.of(self.reference, self.config, self.encoder.image_size)

    @cached_property
    def metric(self) -> FrechetMetric:
        """The distance to the reference."""
        config, held = self.config, self.reference.statistics
        if held is not None and held.pooled is not None:
            return FrechetMetric(held.pooled.target(), config.bootstrap, config.seed)
        rows = self.features(ImageSet(self.real.reference, self.real.size), self.pool)
        return FrechetMetric.to_rows(rows, config.bootstrap, config.seed)

    def features(self, images: ImageSet, pool: Location) -> Tensor:
        """Return (n,D) pooled features, kept in `pool`."""
        return extracted(pool, images, self.extractor, self.config.batch_size, self.runner)[POOLED]

    def require(self, models: Sequence[TrainedDiffusion]) -> None:
        """Check weights and settings of all models, and the statistics, before hours of sampling."""
        require_extractor(self.reference, self.extractor.dimensions, self.extractor.space)
        for model in models:
            self.setting(model)

    def setting(self, model: TrainedDiffusion) -> SamplerSettings:
        """Return the settings of the samples of a checkpoint."""
        return GuidedModel(model).settings(self.config)[0]

    def key(self, model: TrainedDiffusion) -> str:
        """Return a digest of everything that determines the distance of a checkpoint."""
        config, setting = self.config, self.setting(model)
        measured = [software(), self.extractor.description.model_dump(), config.bootstrap, config.num_samples]
        measured += [config.reference_images, self.reference.ref.fingerprint, self.encoder.fingerprint]
        return digest([model.weights_sha256(config.weights), setting.identity, measured])

    def measured(self, model: TrainedDiffusion) -> Json:
        """Sample, decode and measure one checkpoint.

        Returns:
            JSON of its `CheckpointPoint`.
        """
        work, config, setting = self.out / "work" / f"step-{model.step:08d}", self.config, self.setting(model)
        self.progress.say(f"checkpoint of step {model.step}")
        (sampled,) = sample_sweep(Sweep(GuidedModel(model), (setting,), config, work), self.runner, self.progress)
        labels = setting.labels_of(range(config.num_samples), len(model.class_names)).tolist()
        job = ImageJob(setting.name, config.num_samples, store=sampled.store.path, labels=labels)
        mean, std = model.statistics()
        rows, batch = config.unit_rows, config.batch_size
        options = DecoderOptions(self.autoencoder, mean, std, self.real.size, config.seed, rows, batch)
        decode([job], options, work, self.runner, self.progress)
        images = decoded_images(work, setting.name)
        distance = self.metric.measure(self.features(images, work))
        self._show(images, model.step)
        remove_tree(work)
        section = model.section
        point = CheckpointPoint(
            step=model.step,
            epochs=model.step * section.batch_size / len(self.cache.training_rows),
            weights=model.weights_sha256(config.weights),
            frechet_distance=distance,
        )
        return point.model_dump(mode="json")

    def _show(self, images: ImageSet, step: int) -> None:
        """Write the first sample of some classes, side by side."""
        classes, first = np.unique(images.labels, return_index=True)
        chosen = [int(first[place]) for place in evenly_spread(len(classes), SHOWN)]
        buffer = io.BytesIO()
        Image.fromarray(np.concatenate([images.pixels(i) for i in chosen], axis=1)).save(buffer, "PNG")
        make_directory(self.out / SAMPLES)
        write_atomic(self.out / SAMPLES / f"step-{step:08d}.png", buffer.getvalue())

    def curve(
        self, points: list[CheckpointPoint], last: TrainedDiffusion, distances: Sequence[float]
    ) -> CheckpointCurve:
        """Return the curve of measured checkpoints."""
        heldout: Estimate | None = None
        if len(self.real.heldout) >= 2:
            heldout = self.metric.measure(self.features(ImageSet(self.real.heldout, self.real.size), self.pool))
        setting = asdict(self.setting(last))
        words = f"{setting['steps']} steps of {setting['solver']}, {setting['weights']}, {setting['precision']}"
        return CheckpointCurve(
            metric=self.extractor.metric,
            extractor=self.extractor.description,
            reference=self.reference.description,
            num_samples=self.config.num_samples,
            image_size=self.real.size,
            sampler=words,
            heldout=heldout,
            points=points,
            reached=[epochs_to(points, distance) for distance in distances],
        )
