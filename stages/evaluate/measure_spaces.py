"""Fréchet distances in other feature spaces than that of the extractor, one network after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial

from svgpipe.manifests.estimate import Estimate
from svgpipe.manifests.evaluation_section import EvaluationSection
from svgpipe.manifests.filesystem import Location
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.manifest import Json, digest
from svgpipe.manifests.report_file import ExtractorInfo

from ..images.image_set import ImageSet
from ..runtime.progress import Progress
from ..runtime.runner import Runner
from .extracted_features import extract_sets, extracted
from .features import POOLED, Extractor, software, space_extractor
from .metrics import FrechetMetric


@dataclass(frozen=True)
class SpaceDistances:
    """Network of a feature space, and the distances of the sets by name."""

    extractor: ExtractorInfo
    distances: dict[str, Estimate]


def require_spaces(config: EvaluationSection) -> None:
    """Load the network of every space once: missing weights must stop a sweep before it samples for hours.

    Raises:
        ArtifactError: weights are missing. The message says which file and which option.
    """
    for name, weights in config.spaces_used.items():
        space_extractor(name, weights)


def measure_spaces(
    config: EvaluationSection,
    reference: ImageSet,
    sets: Mapping[str, ImageSet],
    places: tuple[Location, Location],
    runner: Runner,
    progress: Progress,
) -> dict[str, SpaceDistances]:
    """Return the distances of all sets to the reference in every space; run again to resume.

    Args:
        config: section `evaluation` of a recipe.
        reference: real images.
        sets: images by name.
        places: the evaluation, and the directory of features that evaluations share.
        runner: where features are computed.
        progress: receives the progress.

    Returns:
        The distances by space.
    """
    out, pool = places
    found: dict[str, SpaceDistances] = {}
    for name, weights in config.spaces_used.items():
        space = _Space(config, space_extractor(name, weights), reference, pool)
        journal = Journal(out, f"journal/spaces/{name}")
        progress.say(f"feature space {name}")
        extract_sets(pool, [reference, *sets.values()], space.extractor, config.batch_size, runner, progress)
        progress.begin(f"compare in {name}", len(sets), "image sets")
        distances = {}
        for number, (one, images) in enumerate(sets.items()):
            kept = journal.kept(number, space.key(images), partial(space.distance, images))
            distances[one] = Estimate.model_validate(kept)
            progress.advance(1, one)
        found[name] = SpaceDistances(space.extractor.description, distances)
    return found


@dataclass(frozen=True)
class _Space:
    """The reference in one feature space."""

    config: EvaluationSection
    extractor: Extractor
    reference: ImageSet
    pool: Location

    def key(self, images: ImageSet) -> str:
        """Return a digest of everything that determines the distance of a set."""
        against = [self.reference.digest, self.extractor.description.model_dump(), self.config.bootstrap]
        return digest([software(), against, self.config.seed, images.digest])

    def distance(self, images: ImageSet) -> Json:
        """Return the distance of a set, as JSON of an `Estimate`."""
        batch_size = self.config.batch_size
        rows = extracted(self.pool, images, self.extractor, batch_size)[POOLED]
        return self._metric.measure(rows).model_dump(mode="json")

    @cached_property
    def _metric(self) -> FrechetMetric:
        """Loaded when first needed: a resumed run with all results does not load the reference."""
        rows = extracted(self.pool, self.reference, self.extractor, self.config.batch_size)[POOLED]
        return FrechetMetric.to_rows(rows, self.config.bootstrap, self.config.seed)
