"""Reads the numbers of a study from its artifacts.

A number is shown only if it was made with the study's settings, and from the artifacts that are there now: an
autoencoder that was trained longer leaves its old cache behind, a model its old evaluation.
"""

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
from svgpipe.manifests.reconstruction import ReconstructionManifest, ReconstructionReport
from svgpipe.manifests.section import Section
from svgpipe.manifests.study import Study
from svgpipe.manifests.study_results import CurvePoint, Sampled, StudyResults, TokenizerResult, VariantResult
from svgpipe.manifests.workdir import with_new_keys
from svgpipe.stages.analyze.analyze import Analysis
from svgpipe.stages.analyze.probe import Probe

from .study import (
    ANALYSIS_NAME,
    EVALUATION,
    PROBE_NAME,
    RECONSTRUCTION,
    Places,
    analysis_key,
    reconstruction_section,
)

R = TypeVar("R", bound=FrozenModel)
A = TypeVar("A", bound=Manifest)


def collect(study: Study, workdir: Location, failures: dict[str, str], reference: str) -> StudyResults:
    """Return the results of all variants, as far as they are there.

    Args:
        study: with its variants.
        workdir: of the study.
        failures: messages by the name of the variant.
        reference: fingerprint of the study's reference.
    """
    places = [Places(workdir, variant) for variant in study.variants]
    variants = [_readable(one, reference, failures.get(one.variant.name)) for one in places]
    reports = [
        Report.read(one.model / EVALUATION) for one, result in zip(places, variants, strict=True) if result.samples
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


def _readable(places: Places, reference: str, failure: str | None) -> VariantResult:
    """Return the results of a variant; without numbers if one of its artifacts is damaged."""
    variant = places.variant
    try:
        return _variant(places, reference, failure)
    except SvgpipeError as error:
        message = failure or str(error)
        return VariantResult(name=variant.name, title=variant.title, state="failed", message=message)


def _variant(places: Places, reference: str, failure: str | None) -> VariantResult:
    variant = places.variant
    encoder, cache = _latents(places)
    model = None if cache is None else _model(places, cache)
    made = None if model is None else _evaluation(places, model, reference)
    report = None if made is None else Report.read(places.model / EVALUATION)
    analysis = None
    if report is not None and cache is not None:
        analysis = _kept(places.model / ANALYSIS_NAME, Analysis, analysis_key(cache, report))
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
        tokenizer=None if encoder is None or cache is None else _tokenizer(places, encoder, cache),
        parameters=None if model is None else model.num_parameters,
        training_steps=None if model is None else model.steps,
        epochs=None if model is None else _epochs(places),
        training_rate=_median([entry["samples_per_s"] for entry in log if "samples_per_s" in entry]),
        training_seconds=None if model is None else model.seconds,
        evaluation_seconds=None if made is None else made.seconds,
        heldout_loss=_curve(log, "heldout_loss"),
        latent_distance=_relative(log),
        velocity_agreement=None if one is None else one.mean_parted,
        curvature=None if straight is None else straight.curvature,
        one_step_error=None if straight is None else straight.one_step,
        samples=[]
        if report is None
        else [_sampled(r) for r in report.results if r.sampler is not None and r.sampler.repeat == 0],
    )


def _latents(places: Places) -> tuple[AutoencoderManifest | None, CacheManifest | None]:
    """Return the manifests of a finished autoencoder, and of a finished cache that it made."""
    recipe, given = places.variant.recipe, places.variant.autoencoder is not None
    encoder = _made(places.autoencoder, AutoencoderManifest, recipe.autoencoder, given=given)
    cache = _made(places.cache, CacheManifest, recipe.extract)
    return encoder, _from(cache, autoencoder=encoder)


def _model(places: Places, cache: CacheManifest) -> DiffusionManifest | None:
    """Return the manifest of a finished model of this cache, or of one that was given."""
    given = places.variant.diffusion is not None
    model = _made(places.diffusion, DiffusionManifest, places.variant.recipe.diffusion, given=given)
    return model if given else _from(model, cache=cache)


def _evaluation(places: Places, model: DiffusionManifest, reference: str) -> EvaluationManifest | None:
    """Return the manifest of a finished evaluation of this model against the reference."""
    made = _made(places.model / EVALUATION, EvaluationManifest, places.variant.recipe.evaluation)
    made = _from(made, diffusion=model)
    return None if made is None or made.inputs["reference"].fingerprint != reference else made


def _tokenizer(places: Places, encoder: AutoencoderManifest, manifest: CacheManifest) -> TokenizerResult:
    out = places.tokenizer / RECONSTRUCTION
    made = _from(_made(out, ReconstructionManifest, reconstruction_section(places.variant)), autoencoder=encoder)
    rebuilt = None if made is None else ReconstructionReport.read(out).results[0]
    probed = _kept(places.tokenizer / PROBE_NAME, Probe, manifest.fingerprint)
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


def _epochs(places: Places) -> float | None:
    """Return the epochs of a model that was trained here."""
    section = places.variant.recipe.diffusion
    if places.variant.diffusion is not None:
        return None
    return section.steps * section.batch_size / max(1, len(FeatureCache(places.cache).training_rows))


def _from(artifact: A | None, **inputs: Manifest | None) -> A | None:
    """Return the manifest of an artifact if it was made from these inputs."""
    if artifact is None or any(made is None for made in inputs.values()):
        return None
    fits = all(artifact.inputs[name].fingerprint == made.fingerprint for name, made in inputs.items() if made)
    return artifact if fits else None


def _made(path: Location, kind: type[A], section: Section, *, given: bool = False) -> A | None:
    """Return the manifest of a finished artifact that was made with this section of a recipe, or was given."""
    if not _finished(path):
        return None
    manifest, wanted = kind.read(path), section.model_dump(mode="json")
    config = with_new_keys(kind.upgraded(manifest.config), wanted)
    same = all(config.get(key) == value for key, value in wanted.items() if key not in kind.MAY_CHANGE)
    return manifest if given or same else None


def _finished(path: Location) -> bool:
    return (path / MANIFEST_NAME).exists()


def _kept(path: Location, kind: type[R], key: str) -> R | None:
    """Return a result that was made from `key`; None if it is not there, or is damaged and will be made again."""
    try:
        content = read_json(path) if path.exists() else {}
    except ArtifactError:
        return None
    return kind.model_validate(content["result"]) if content.get("made_from") == key else None


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
