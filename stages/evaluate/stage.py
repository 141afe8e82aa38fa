"""`svgpipe sample-and-eval`: sample a sweep of steps × guidance, decode, measure, and write report.json.

Each phase is a list of units with a journal, so an interrupted sweep resumes:

    sample    latents of every setting, into Zarr groups; noise and label of sample i depend only on (seed, i)
    decode    these latents, reconstructions of real images, and noise, into WebDataset tars
    measure   features of every set, then distances to the reference

Three reference lines: held-out real images (the floor), reconstructions (a perfect diffusion model) and decoded noise
(the ceiling).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from svgpipe.manifests.alignment import keep_alignment, require_same_alignment
from svgpipe.manifests.evaluation import EvaluationManifest, LatentsRef, ModelInfo, Report
from svgpipe.manifests.evaluation_section import EvaluationSection
from svgpipe.manifests.filesystem import Location, file_sha256
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.manifest import digest
from svgpipe.manifests.report_file import REPORT_NAME
from svgpipe.manifests.shards import ShardFile
from svgpipe.manifests.workdir import WorkDir

from ..extract.align import align_for_evaluation, needs_alignment
from ..networks.sampling import shift_told
from ..runtime.progress import Progress, Recorded
from ..runtime.runner import LocalRunner, Runner
from .decode_latents import DecoderOptions, ImageJob, decode
from .features import software
from .measure_images import NOISE, RECONSTRUCTIONS, Compared, measure
from .measure_spaces import require_spaces
from .plan import EvaluationPlan
from .reference import Reference, require_decodable, was_decoded
from .sample_latents import SampledLatents, Sweep, sample_sweep
from .summary import over_seeds


def sample_and_eval(
    diffusion: Location,
    autoencoder: Location,
    reference: Reference,
    out: Location,
    config: EvaluationSection,
    *,
    guide: Location | None = None,
    pool: Location | None = None,
    runner: Runner | None = None,
    progress: Progress | None = None,
) -> EvaluationManifest:
    """Run the sweep and publish it at `out`; run again to resume.

    Args:
        diffusion: finished diffusion model.
        autoencoder: the autoencoder of its cache.
        reference: real images or statistics; of a shard set, the training split.
        out: directory to create or resume.
        config: section `evaluation` of a recipe.
        guide: a worse model of the same cache, finished or a checkpoint, for autoguidance.
        pool: holds `latents` and `features`, which sweeps share; None: the parent of `out`.
        runner: where units run; default: in this process.
        progress: receives the progress.

    Returns:
        The manifest of the evaluation.

    Raises:
        MismatchError: the autoencoder did not make the cache, the guide has other latents, or `out` holds another
            sweep.
        ArtifactError: missing weights or images.
        UsageError: an unknown guidance mode, unknown weights, or
            statistics of other features than the extractor's.
        BusyError: another process works in `out`, or samples the same latents.
    """
    plan = EvaluationPlan.resolve(diffusion, autoencoder, reference, out, config, guide=guide, pool=pool)
    with WorkDir(plan.spec) as work:
        require_same_alignment(autoencoder, out)
        if work.finished is not None:
            Report.require_published(out, work.finished.report)
            return work.finished
        return _evaluate(plan, work, runner or LocalRunner(), Recorded(progress, out))


def _evaluate(
    plan: EvaluationPlan, work: WorkDir[EvaluationManifest], runner: Runner, progress: Progress
) -> EvaluationManifest:
    """Sample, decode and measure.

    Returns:
        The manifest.
    """
    model = plan.sampler.model
    told = shift_told("time_shift", plan.config.time_shift, model.cells, model.channels)
    if told is not None and model.objective == "flow":
        progress.say(told)
    _ = plan.extractor  # missing weights must stop a sweep before it samples for hours
    require_spaces(plan.config)
    sets = plan.sets
    if not was_decoded(plan.reference.shards):
        looked = Journal(plan.out, "journal/looked")
        require_decodable([*sets.reference, *sets.heldout, *sets.reconstructed], looked, progress)
    can_encode = _align(plan, runner, progress)
    sweep = Sweep(plan.sampler, plan.settings, plan.config, plan.pool)
    sampled = sample_sweep(sweep, runner, progress)
    images = decode(_image_jobs(plan, sampled, can_encode), _decoder_options(plan), plan.out, runner, progress)
    measured = measure(plan, images, runner, progress)
    _report(plan, measured).write(plan.out)
    return work.publish(_manifest(plan, sampled, images))


def _align(plan: EvaluationPlan, runner: Runner, progress: Progress) -> bool:
    """Measure the alignment of an imported autoencoder, if needed.

    Returns:
        Whether the autoencoder can encode images now.
    """
    can_encode = not needs_alignment(plan.autoencoder, plan.encoder)
    if not can_encode and plan.reference.shards is not None:
        batch_size = plan.config.batch_size
        align_for_evaluation(plan.reference.shards, plan.autoencoder, plan.encoder, batch_size, runner, progress)
        can_encode = True
    keep_alignment(plan.autoencoder, plan.out)
    return can_encode


def _image_jobs(plan: EvaluationPlan, sampled: Sequence[SampledLatents], can_encode: bool) -> list[ImageJob]:
    """Return the sets to decode: the samples of every setting, then reconstructions and noise."""
    count, originals = plan.config.num_samples, plan.sets.reconstructed
    jobs = [
        # Labels are computed, because another sweep may be writing those of the store.
        ImageJob(
            one.setting.name,
            count,
            store=one.store.path,
            labels=one.setting.labels_of(range(count), len(plan.class_names)).tolist(),
        )
        for one in sampled
    ]
    if can_encode and originals:
        jobs.append(ImageJob(RECONSTRUCTIONS, len(originals), originals=originals))
    return [*jobs, ImageJob(NOISE, count)]


def _decoder_options(plan: EvaluationPlan) -> DecoderOptions:
    mean, std = plan.sampler.model.statistics()
    config = plan.config
    return DecoderOptions(plan.autoencoder, mean, std, plan.sets.size, config.seed, config.unit_rows, config.batch_size)


def _report(plan: EvaluationPlan, measured: Compared) -> Report:
    return Report(
        inputs={name: ref.fingerprint for name, ref in plan.inputs.items()},
        software=software(),
        metric=plan.extractor.metric,
        extractor=plan.extractor.description,
        reference=measured.reference,
        diffusion=ModelInfo(
            steps=plan.diffusion.steps,
            num_parameters=plan.diffusion.num_parameters,
            weights_sha256=plan.sampler.model.weights_sha256(plan.config.weights),
        ),
        num_samples=plan.config.num_samples,
        image_size=plan.sets.size,
        class_names=plan.class_names,
        preset=plan.config.preset,
        protocol=plan.config.protocol,
        spaces={name: space.extractor for name, space in measured.spaces.items()},
        seeds=over_seeds(measured.results, plan.extractor.description.name),
        deviations=plan.deviations,
        results=measured.results,
        not_measured=measured.not_measured,
    )


def _manifest(
    plan: EvaluationPlan, sampled: Sequence[SampledLatents], images: Mapping[str, Sequence[ShardFile]]
) -> EvaluationManifest:
    tars = {name: [shard.sha256 for shard in shards] for name, shards in images.items()}
    latents = {
        one.setting.name: LatentsRef(path=_path_from(plan.out, one.store.path), content=digest(one.hashes))
        for one in sampled
    }
    return EvaluationManifest(
        num_samples=plan.config.num_samples,
        settings=[setting.name for setting in plan.settings],
        latents=latents,
        content=digest([[ref.content for ref in latents.values()], tars]),
        report=file_sha256(plan.out / REPORT_NAME),
    )


def _path_from(out: Location, path: Location) -> str:
    """Return a relative path between folders, so that they can be moved together."""
    if isinstance(out, Path) and isinstance(path, Path):
        return os.path.relpath(path.resolve(), out.resolve())
    return str(path)
