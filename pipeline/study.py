"""`svgpipe study`: train, sample and measure all variants of a study over one shard set.

WORKDIR/shards                   shared by all
WORKDIR/tokenizers/NAME/         autoencoder, cache, reconstruction, probe.json; NAME is the first variant with them
WORKDIR/models/NAME/             diffusion, evaluation, analysis.json
WORKDIR/shared/                  features of images and sampled latents
WORKDIR/study.json, study.html   the tables, written again after every variant

A variant that fails does not stop the others. Every stage resumes, and finished ones are skipped.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

from svgpipe.manifests.cache import FeatureCache
from svgpipe.manifests.cache_manifest import CacheManifest
from svgpipe.manifests.errors import (
    ArtifactError,
    InterruptedRunError,
    MismatchError,
    SvgpipeError,
    memory_error,
)
from svgpipe.manifests.evaluation import Report
from svgpipe.manifests.evaluation_section import ReconstructionSection
from svgpipe.manifests.filesystem import Location, location, make_directory
from svgpipe.manifests.kinds import STUDY_FOLDERS
from svgpipe.manifests.lock import locked
from svgpipe.manifests.manifest import FrozenModel, read_json, write_json
from svgpipe.manifests.model_manifests import AutoencoderManifest
from svgpipe.manifests.shards import ShardSet
from svgpipe.manifests.study import Study, Variant
from svgpipe.stages.analyze.analyze import analyze
from svgpipe.stages.analyze.probe import probe
from svgpipe.stages.evaluate.reconstruction import eval_reconstruction
from svgpipe.stages.evaluate.reference import Reference, open_reference, shard_reference
from svgpipe.stages.evaluate.stage import sample_and_eval
from svgpipe.stages.extract.stage import extract
from svgpipe.stages.extract.vision_source import VisionSource
from svgpipe.stages.runtime.progress import Progress
from svgpipe.stages.shard.from_images import shard
from svgpipe.stages.train_autoencoder.stage import train_autoencoder
from svgpipe.stages.train_diffusion.stage import train_diffusion

from .cluster import runner_for, training_cluster
from .demo import write_photographs
from .report import render_report
from .run import RunOptions
from .sources import DEMO_SOURCE, image_sources, source_folder
from .study_checks import check_study, require_measurable

SHARDS, SHARED = "shards", "shared"
TOKENIZERS, MODELS = STUDY_FOLDERS
RECONSTRUCTION, EVALUATION = "reconstruction", "evaluation"
PROBE_NAME, ANALYSIS_NAME = "probe.json", "analysis.json"


@dataclass(frozen=True)
class Places:
    """Where the artifacts of a variant lie."""

    workdir: Location
    variant: Variant

    @property
    def tokenizer(self) -> Location:
        """Folder of the tokenizer, which variants share."""
        return self.workdir / TOKENIZERS / self.variant.tokenizer

    @property
    def model(self) -> Location:
        """Folder of the model."""
        return self.workdir / MODELS / self.variant.name

    @property
    def autoencoder(self) -> Location:
        """The autoencoder: trained here, or given."""
        given = self.variant.autoencoder
        return self.tokenizer / "autoencoder" if given is None else location(given)

    @property
    def diffusion(self) -> Location:
        """The diffusion model: trained here, or given."""
        given = self.variant.diffusion
        return self.model / "diffusion" if given is None else location(given)

    @property
    def cache(self) -> Location:
        """The feature cache."""
        return self.tokenizer / "cache"


@dataclass
class StudyRun:
    """One run of a study.

    Attributes:
        publish: writes the results that are there, given the failures and the fingerprint of the reference; called at
            the start and after every variant.
        failures: messages by the name of the variant.
        broken: tokenizers that failed; they are not tried again for other variants.
    """

    study: Study
    workdir: Location
    options: RunOptions
    progress: Progress
    publish: Callable[[dict[str, str], str], None]
    failures: dict[str, str] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)

    def run(self, chosen: list[Variant]) -> None:
        """Make the shards, then every chosen variant.

        Args:
            chosen: variants of the study.

        Raises:
            UsageError: settings of a variant that do not fit each other, and nothing was made; or shards without what
                the measurements need, and nothing was trained. Also the errors of `shard`.
        """
        check_study(self.study, chosen)
        make_directory(self.workdir)
        recipe = self.study.variants[0].recipe
        folder = source_folder(recipe.source, self.workdir)
        if recipe.source == DEMO_SOURCE:
            folder.parent.mkdir(parents=True, exist_ok=True)
            write_photographs(folder)
        shard(image_sources(recipe, folder), self.workdir / SHARDS, recipe.shard, progress=self.progress)
        shards = ShardSet.open(self.workdir / SHARDS)
        require_measurable(shards)
        reference = self._reference(shards)
        self.publish(self.failures, reference.ref.fingerprint)
        for variant in chosen:
            self._one(variant, shards, reference)
            self.publish(self.failures, reference.ref.fingerprint)

    def _one(self, variant: Variant, shards: ShardSet, reference: Reference) -> None:
        """Make one variant. Its failure is recorded and does not stop the others.

        Raises:
            InterruptedRunError: the user stopped the run.
        """
        self.progress.say(f"variant {variant.name}")
        try:
            target = None
            if variant.align is not None:
                target = FeatureCache(self._tokenizer(self.study.variant(variant.align), shards).cache)
            places = self._tokenizer(variant, shards)
            self._model(places, reference, target)
        except InterruptedRunError:
            raise
        except Exception as error:
            known = error if isinstance(error, SvgpipeError | OSError) else memory_error(error)
            if known is None or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
                raise
            advice = " Rename or delete that folder to make it again." if isinstance(error, MismatchError) else ""
            self.failures[variant.name] = " ".join(str(known).split()) + advice
            self.progress.say(f"variant {variant.name} failed: {self.failures[variant.name]} The others go on.")

    def _tokenizer(self, variant: Variant, shards: ShardSet) -> Places:
        """Make a tokenizer, unless that failed before.

        Returns:
            Where it is.

        Raises:
            InterruptedRunError: the user stopped the study.
            SvgpipeError: it failed, now or for another variant.
        """
        if variant.tokenizer in self.broken:
            raise SvgpipeError(f"its tokenizer {variant.tokenizer} failed, see there.")
        try:
            return self._make_tokenizer(variant, shards)
        except InterruptedRunError:
            raise
        except SvgpipeError:
            self.broken.add(variant.tokenizer)
            raise

    def _make_tokenizer(self, variant: Variant, shards: ShardSet) -> Places:
        """Train the autoencoder, extract, and measure the latents.

        Returns:
            Where they are.
        """
        places, recipe, progress = Places(self.workdir, variant), variant.recipe, self.progress
        make_directory(places.tokenizer)
        trainers, options = self.options.trainers, self.options
        if variant.autoencoder is None:
            with training_cluster(trainers, options.address):
                train_autoencoder(shards, places.autoencoder, recipe.autoencoder, resources=trainers, progress=progress)
        with runner_for(options.resources, options.address) as runner:
            extract(
                shards,
                places.autoencoder,
                places.cache,
                recipe.extract,
                max_rejects=options.max_rejects,
                vision_from=self._vision_source(places, shards),
                runner=runner,
                progress=progress,
            )
            measured = reconstruction_section(variant)
            out, pool = places.tokenizer / RECONSTRUCTION, self.workdir / SHARED
            eval_reconstruction(places.autoencoder, shards, out, measured, pool=pool, runner=runner, progress=progress)
        cache = FeatureCache(places.cache)
        _kept(places.tokenizer / PROBE_NAME, cache.manifest.fingerprint, lambda: probe(cache, progress=progress))
        return places

    def _vision_source(self, places: Places, shards: ShardSet) -> Location | None:
        """Return a finished cache of this study that has the vision features of a tokenizer, if there is one."""
        encoder = AutoencoderManifest.read(places.autoencoder)
        known_rejects = int(shards.rows.rejected.sum())
        for other in self.study.variants:
            cache = Places(self.workdir, other).cache
            with suppress(SvgpipeError):  # not there yet, or other features
                source = VisionSource.open(cache, shards, encoder, places.variant.recipe.extract)
                if source.cache.manifest.num_rejected == known_rejects:  # else rows may be missing without need
                    return cache
        return None

    def _model(self, places: Places, reference: Reference, target: FeatureCache | None) -> None:
        """Train the transformer, sample, and analyse its paths."""
        variant, options, progress = places.variant, self.options, self.progress
        make_directory(places.model)
        cache, recipe = FeatureCache(places.cache), variant.recipe
        if variant.diffusion is None:
            with training_cluster(options.trainers, options.address):
                train_diffusion(
                    cache,
                    places.diffusion,
                    recipe.diffusion,
                    align=target,
                    autoencoder=places.autoencoder,
                    resources=options.trainers,
                    strategy=options.strategy,
                    progress=progress,
                )
        out = places.model / EVALUATION
        with runner_for(options.resources, options.address) as runner:
            evaluate = partial(sample_and_eval, pool=self.workdir / SHARED, runner=runner, progress=progress)
            evaluate(places.diffusion, places.autoencoder, reference, out, recipe.evaluation)
        _write_page(out, places, reference)
        weights = recipe.evaluation.weights
        made = partial(analyze, [cache], [places.diffusion], weights=weights, progress=progress)
        _kept(places.model / ANALYSIS_NAME, analysis_key(cache.manifest, Report.read(out)), made)

    def _reference(self, shards: ShardSet) -> Reference:
        """Return the images that distances are measured to: of the study, or the training split."""
        if self.study.reference is None:
            return shard_reference(shards)
        count = self.study.variants[0].recipe.evaluation.reference_images
        return open_reference(self.study.reference, count=count, pool=self.workdir / SHARED)


def reconstruction_section(variant: Variant) -> ReconstructionSection:
    """Return how reconstructions are measured: in the feature space of the samples."""
    recipe = variant.recipe
    return recipe.reconstruction.model_copy(update={"extractor": recipe.evaluation.extractor})


def analysis_key(cache: CacheManifest, report: Report) -> str:
    """Return what an analysis was made from: the cache and the weights."""
    return f"{cache.fingerprint} {report.diffusion.weights_sha256}"


def _write_page(evaluation: Location, places: Places, reference: Reference) -> None:
    """Write the page of an evaluation, if it is not there yet."""
    if not (evaluation / "report.html").exists():
        render_report(evaluation, places.autoencoder, places.diffusion, reference)


def _kept(path: Location, key: str, make: Callable[[], FrozenModel]) -> None:
    """Write a result as JSON, unless the file has the result for this key: what it was made from."""
    with suppress(ArtifactError):  # a damaged file is made again
        if path.exists() and read_json(path).get("made_from") == key:
            return
    with locked(path.parent):  # so that `svgpipe status` sees that it runs
        write_json(path, {"made_from": key, "result": make().model_dump(mode="json")})
