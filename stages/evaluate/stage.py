"""`svgpipe sample-and-eval`: a sweep of steps × guidance → latents → decoded images → distances → report.json.

Each phase is a Ray Data pipeline over units with a journal, so an interrupted sweep resumes:

    draw      latents of every setting, into Zarr groups; noise and label of sample i follow (seed, i) alone
    decode    those latents, reconstructions of real images and pure noise, into WebDataset tars
    measure   features of every set, then distances to the reference

Three reference lines make the numbers readable: held-out real images (the floor), reconstructions (what a perfect
diffusion model would get) and decoded noise (the ceiling).
"""

from __future__ import annotations

import os
from pathlib import Path

from svgpipe.manifests.alignment import keep_alignment, require_same_alignment
from svgpipe.manifests.checkpoint import AutoencoderManifest, DiffusionManifest
from svgpipe.manifests.evaluation import EvaluationManifest, LatentsRef, ModelRecord, Report
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.manifest import WorkDir, digest, require_same
from svgpipe.manifests.recipe import AutoencoderSection, EvaluationSection
from svgpipe.manifests.report_file import REPORT_NAME
from svgpipe.manifests.storage import Location, file_sha256

from ..extract.align import align_for_evaluation, needs_alignment
from ..networks.autoencoder import build_backbone
from ..networks.diffusion import open_diffusion
from ..networks.sampling import labels_of
from ..runtime.progress import Progress, Recorded
from ..runtime.runner import Resources
from .compare import NOISE, RECONSTRUCTIONS, compare
from .decode import ImageJob, decode
from .features import load_extractor, software, weight_inputs
from .reference import RealSets, Reference, require_decodable, require_extractor, was_decoded
from .sample_latents import DrawnLatents, Sampler, draw


def sample_and_eval(
    diffusion: Location,
    autoencoder: Location,
    reference: Reference,
    out: Location,
    config: EvaluationSection,
    *,
    guide: Location | None = None,
    pool: Location | None = None,
    resources: Resources | None = None,
    progress: Progress | None = None,
) -> EvaluationManifest:
    """Run the sweep and publish it at `out`; run again to resume. Ray must be connected.

    Args:
        diffusion: finished diffusion model. autoencoder: the one whose latents it was trained on.
        reference: what distances are measured against; of a shard set, its training split.
        out: directory to create or resume.
        guide: a worse model of the same cache, finished or a checkpoint, for autoguidance.
        pool: holds `latents`, `decoded` and `features`, which other sweeps find there; without it, where `out` lies.
    Raises:
        MismatchError: the autoencoder is not the one that made the cache, the guide draws other latents, or `out`
            holds another sweep.
        ArtifactError: missing weights or images. UsageError: a guidance mode that does not exist, no such weights, or
            statistics of other features than the extractor's.
        BusyError: another process works in `out`, or draws the same latents.
    """
    resources = resources or Resources()
    manifest, encoder = DiffusionManifest.read(diffusion), AutoencoderManifest.read(autoencoder)
    sampler = Sampler(open_diffusion(diffusion), None if guide is None else open_diffusion(guide))
    sampler.require_match()
    settings = sampler.settings(config)
    require_same(
        str(diffusion),
        manifest.inputs["cache"].inputs["autoencoder"],
        encoder.as_input(autoencoder),
        what_to_do="Sample with the autoencoder that extracted the cache; another one decodes to noise.",
    )
    inputs = {
        "diffusion": manifest.as_input(diffusion),
        "autoencoder": encoder.as_input(autoencoder),
        "reference": reference.ref,
        **sampler.guide_input(config),
        **weight_inputs(extractor=config.extractor.weights),
    }
    with WorkDir(out, EvaluationManifest, config.model_dump(mode="json"), inputs) as work:
        require_same_alignment(autoencoder, out)
        if work.finished is not None:
            Report.require_published(out, work.finished.report)
            return work.finished
        # Weights that are missing should stop a sweep before it has sampled for hours.
        extractor = load_extractor(
            config.extractor,
            build_backbone(AutoencoderSection.model_validate(encoder.config).backbone, encoder.image_size, autoencoder),
        )
        require_extractor(reference, extractor.dimensions, extractor.description.name)
        progress = Recorded(progress, out)
        sets = RealSets.of(reference, config, encoder.image_size)
        if not was_decoded(reference.shards):
            looked = Journal(out / "journal" / "looked")
            require_decodable([*sets.reference, *sets.heldout, *sets.reconstructed], looked, progress)
        can_encode = not needs_alignment(autoencoder, encoder)
        if not can_encode and reference.shards is not None:
            align_for_evaluation(reference.shards, autoencoder, encoder, config.batch_size, resources, progress)
            can_encode = True
        keep_alignment(autoencoder, out)
        pool = pool or out.parent
        drawn = draw(sampler, settings, config, pool / "latents", resources=resources, progress=progress)
        rebuilt = ImageJob(RECONSTRUCTIONS, len(sets.reconstructed), originals=sets.reconstructed)
        mean, std = sampler.model.statistics()
        images = decode(
            [
                *(_decoding(one, config, len(manifest.class_names)) for one in drawn),
                *([rebuilt] if can_encode and sets.reconstructed else []),
                ImageJob(NOISE, config.num_samples),
            ],
            autoencoder,
            out,
            pool=pool,
            mean=mean,
            std=std,
            size=sets.size,
            seed=config.seed,
            unit_rows=config.unit_rows,
            batch_size=config.batch_size,
            resources=resources,
            progress=progress,
        )
        compared = compare(
            out,
            reference,
            sets,
            images,
            settings,
            manifest.class_names,
            extractor,
            pool=pool / "features",
            config=config,
            progress=progress,
        )
        Report(
            inputs={name: ref.fingerprint for name, ref in work.inputs.items()},
            software=software(),
            metric=extractor.metric,
            extractor=extractor.description,
            reference=compared.reference,
            diffusion=ModelRecord(
                steps=manifest.steps,
                num_parameters=manifest.num_parameters,
                weights_sha256=sampler.model.weights_sha256(config.weights),
            ),
            num_samples=config.num_samples,
            image_size=sets.size,
            class_names=manifest.class_names,
            results=compared.results,
            not_measured=compared.not_measured,
        ).write(out)
        tars = {name: [shard.sha256 for shard in shards] for name, shards in images.items()}
        latents = {
            one.setting.name: LatentsRef(path=_path_from(out, one.store.path), content=digest(one.hashes))
            for one in drawn
        }
        return EvaluationManifest(
            config=work.config,
            inputs=work.inputs,
            seconds=work.seconds,
            num_samples=config.num_samples,
            settings=[setting.name for setting in settings],
            latents=latents,
            content=digest([[ref.content for ref in latents.values()], tars]),
            report=file_sha256(out / REPORT_NAME),
        ).publish(out)


def _decoding(drawn: DrawnLatents, config: EvaluationSection, num_classes: int) -> ImageJob:
    """The samples of a setting. Labels are computed: another sweep may be adding to those of the store right now."""
    count, rows = config.num_samples, config.unit_rows
    labels = labels_of(range(count), num_classes, drawn.setting).tolist()
    contents = [drawn.content(first, min(first + rows, count)) for first in range(0, count, rows)]
    return ImageJob(drawn.setting.name, count, store=drawn.store.path, labels=labels, contents=contents)


def _path_from(out: Location, path: Location) -> str:
    """Relative where both are folders, so that they can be moved together."""
    if isinstance(out, Path) and isinstance(path, Path):
        return os.path.relpath(path.resolve(), out.resolve())
    return str(path)
