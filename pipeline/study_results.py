"""Reads the numbers of a study from its artifacts."""

from __future__ import annotations

import statistics
from typing import TypeVar

from svgpipe.manifests.cache import FeatureCache
from svgpipe.manifests.cache_manifest import VISION_FROM, CacheManifest
from svgpipe.manifests.errors import ArtifactError, SvgpipeError
from svgpipe.manifests.evaluation import EvaluationManifest, Measured, Report
from svgpipe.manifests.filesystem import Location
from svgpipe.manifests.manifest import MANIFEST_NAME, FrozenModel, Manifest, read_json
from svgpipe.manifests.metrics_file import METRICS_NAME, read_metrics
from svgpipe.manifests.model_manifests import AutoencoderManifest, DiffusionManifest
from svgpipe.manifests.reconstruction import ReconstructionReport
from svgpipe.manifests.section import Section
from svgpipe.manifests.study import Study, Variant
from svgpipe.manifests.study_results import CurvePoint, Sampled, StudyResults, TokenizerResult, VariantResult
from svgpipe.stages.analyze.analyze import Analysis
from svgpipe.stages.analyze.probe import Probe

from .study import ANALYSIS_NAME, PROBE_NAME, Places

R = TypeVar("R", bound=FrozenModel)
A = TypeVar("A", bound=Manifest)


def collect(study: Study, workdir: Location, failures: dict[str, str]) -> StudyResults:
    """Return the results of all variants, as far as they are there.

    Args:
        study: with its variants.
        workdir: of the study.
        failures: messages by the name of the variant.
    """
    variants = [_readable(variant, Places(workdir, variant), failures.get(variant.name)) for variant in study.variants]
    reports = [
        report
        for variant, result in zip(study.variants, variants, strict=True)
        if result.samples and (report := _report(Places(workdir, variant))) is not None
    ]
    lines = [result for report in reports for result in report.results]
    noise = [line.frechet_distance for line in lines if line.role == "decoded-noise"]
    heldout = [line.frechet_distance for line in lines if line.role == "heldout"]
    return StudyResults(
        name=study.name,
        metric=reports[0].metric if reports else None,
        num_samples=study.variants[0].recipe.evaluation.num_samples,
        reference=reports[0].reference.description if reports else None,
        heldout_distance=heldout[0] if heldout else None,
        noise_distance=max(noise, key=lambda estimate: estimate.value) if noise else None,
        variants=variants,
    )


def _readable(variant: Variant, places: Places, failure: str | None) -> VariantResult:
    """Return the results of a variant; without numbers if one of its artifacts is damaged."""
    try:
        return _variant(variant, places, failure)
    except SvgpipeError as error:
        message = failure or str(error)
        return VariantResult(name=variant.name, title=variant.title, state="failed", message=message)


def _variant(variant: Variant, places: Places, failure: str | None) -> VariantResult:
    model = _made(places.diffusion, DiffusionManifest, variant.recipe.diffusion, given=variant.diffusion is not None)
    report = None if model is None else _report(places)
    analysis = None if report is None else _kept(places.model / ANALYSIS_NAME, Analysis)
    one = None if analysis is None else analysis.caches[0]
    straight = None if one is None else one.straightness
    log = read_metrics(places.diffusion / METRICS_NAME)
    state = "failed" if failure is not None else "unfinished" if report is None or analysis is None else "finished"
    return VariantResult(
        name=variant.name,
        title=variant.title,
        state=state,
        message=failure,
        paper=variant.paper,
        tokenizer=_tokenizer(places),
        parameters=None if model is None else model.num_parameters,
        training_steps=None if model is None else model.steps,
        epochs=None if model is None else _epochs(variant, places),
        training_rate=_median([entry["samples_per_s"] for entry in log if "samples_per_s" in entry]),
        training_seconds=None if model is None else model.seconds,
        evaluation_seconds=None if report is None else EvaluationManifest.read(places.model / "evaluation").seconds,
        heldout_loss=_curve(log, "heldout_loss"),
        latent_distance=_relative(log),
        velocity_agreement=None if one is None else one.mean_parted,
        curvature=None if straight is None else straight.curvature,
        one_step_error=None if straight is None else straight.one_step,
        samples=[] if report is None else [_sampled(r) for r in report.results if r.role == "samples"],
    )


def _tokenizer(places: Places) -> TokenizerResult | None:
    recipe, given = places.variant.recipe, places.variant.autoencoder is not None
    encoder = _made(places.autoencoder, AutoencoderManifest, recipe.autoencoder, given=given)
    manifest = _made(places.cache, CacheManifest, recipe.extract)
    if encoder is None or manifest is None:
        return None
    out = places.tokenizer / "reconstruction"
    rebuilt = ReconstructionReport.read(out).results[0] if _finished(out) else None
    probed = _kept(places.tokenizer / PROBE_NAME, Probe)
    rate = manifest.timings.get("steady_images_per_s")
    return TokenizerResult(
        kind=encoder.section.kind,
        latent=manifest.latent_shape,
        bytes_per_image=manifest.num_bytes / manifest.num_samples / len(manifest.views),
        psnr=None if rebuilt is None else rebuilt.psnr,
        ssim=None if rebuilt is None else rebuilt.ssim,
        reconstruction_distance=None if rebuilt is None else rebuilt.frechet_distance,
        linear_probe=None if probed is None else probed.groups[-1].linear,
        training_seconds=encoder.seconds,
        extraction_seconds=manifest.seconds,
        extraction_rate=rate,
        vision_features_copied=VISION_FROM in manifest.timings,
    )


def _sampled(result: Measured) -> Sampled:
    assert result.sampler is not None, "samples have the settings of their sampler"
    return Sampled(
        steps=result.sampler.steps,
        guidance=result.sampler.guidance,
        frechet_distance=result.frechet_distance,
        precision=result.precision,
        recall=result.recall,
        class_accuracy=result.class_accuracy,
    )


def _epochs(variant: Variant, places: Places) -> float | None:
    if variant.diffusion is not None or not _finished(places.cache):
        return None
    section = variant.recipe.diffusion
    return section.steps * section.batch_size / max(1, len(FeatureCache(places.cache).training_rows))


def _report(places: Places) -> Report | None:
    out = places.model / "evaluation"
    made = _made(out, EvaluationManifest, places.variant.recipe.evaluation)
    return None if made is None else Report.read(out)


def _made(path: Location, kind: type[A], section: Section, *, given: bool = False) -> A | None:
    """Return the manifest of a finished artifact that was made with this section of a recipe, or was given."""
    if not _finished(path):
        return None
    manifest, wanted = kind.read(path), section.model_dump(mode="json")
    config = kind.upgraded(manifest.config)
    same = all(
        config[key] == value if key in config else value in (None, False)
        for key, value in wanted.items()
        if key not in kind.MAY_CHANGE
    )
    return manifest if given or same else None


def _finished(path: Location) -> bool:
    return (path / MANIFEST_NAME).exists()


def _kept(path: Location, kind: type[R]) -> R | None:
    """Return a result that the run has written; None if it is not there, or is damaged and will be made again."""
    try:
        return kind.model_validate(read_json(path)["result"]) if path.exists() else None
    except ArtifactError:
        return None


def _curve(log: list[dict[str, float]], name: str) -> list[CurvePoint]:
    return [CurvePoint(step=int(entry["step"]), value=entry[name]) for entry in log if name in entry]


def _relative(log: list[dict[str, float]]) -> list[CurvePoint]:
    """Return the distances of latents over those of as many real rows."""
    real = "latent_fd_real"
    return [
        CurvePoint(step=int(entry["step"]), value=entry["latent_fd"] / entry[real])
        for entry in log
        if "latent_fd" in entry and entry.get(real, 0) > 0
    ]


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None
