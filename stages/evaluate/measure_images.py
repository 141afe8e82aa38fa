"""Measures image sets: features, then the numbers of the report. The metrics are in metrics.py."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from svgpipe.manifests.estimate import Estimate
from svgpipe.manifests.evaluation import Measured, ReferenceInfo, SamplerInfo
from svgpipe.manifests.evaluation_section import EvaluationSection
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.manifest import Json, digest
from svgpipe.manifests.shards import ShardFile, refs_of
from svgpipe.models.neighbours import DENSITY_NEIGHBOURS, PRECISION_NEIGHBOURS

from ..images.decode import psnr
from ..images.image_set import ImageSet
from ..networks.sampling import SamplerSettings
from ..runtime.progress import Progress
from ..runtime.runner import Runner
from .extracted_features import extract_sets, extracted
from .features import LOGITS, POOLED, SPATIAL, software
from .intervals import mean_estimate
from .measure_spaces import SpaceDistances, measure_spaces
from .metrics import Comparison, Features
from .neighbour_metrics import MIN_HELDOUT
from .plan import EvaluationPlan
from .summary import with_ratios

HELDOUT, RECONSTRUCTIONS, NOISE = "heldout", "reconstructions", "decoded-noise"
BASELINES = (HELDOUT, RECONSTRUCTIONS, NOISE)  # for comparison with the samples; each name is also a role
REFERENCE = "reference"


@dataclass(frozen=True)
class Compared:
    """Results of all sets."""

    reference: ReferenceInfo
    results: list[Measured]
    spaces: dict[str, SpaceDistances]
    not_measured: list[str]


def measure(
    plan: EvaluationPlan, images: Mapping[str, Sequence[ShardFile]], runner: Runner, progress: Progress
) -> Compared:
    """Measure every set against the reference; run again to resume.

    Args:
        plan: the evaluation.
        images: tars of every decoded set, by name.
        runner: where features are computed.
        progress: receives the progress.

    Returns:
        The numbers of the report.
    """
    work = _Measurement(plan, _image_sets(plan, images))
    extract_sets(plan.pool, [*work.sets.values()], plan.extractor, plan.config.batch_size, runner, progress)
    names = [*work.sampled, *(line for line in BASELINES if line in work.sets)]
    journal = Journal(plan.out, "journal/compare")  # the intervals of 50,000 images take minutes
    progress.begin("compare", len(names), "image sets")
    results = []
    for number, name in enumerate(names):
        measured = journal.kept(number, work.key(name), functools.partial(work.measured, name))
        results.append(Measured.model_validate(measured))
        progress.advance(1, name)
    spaces = work.spaces(names, runner, progress)
    results = [
        result.model_copy(update={"spaces": {space: found.distances[result.name] for space, found in spaces.items()}})
        for result in results
    ]
    return Compared(work.reference, with_ratios(results, HELDOUT), spaces, work.not_measured())


def _image_sets(plan: EvaluationPlan, images: Mapping[str, Sequence[ShardFile]]) -> dict[str, ImageSet]:
    """Return the reference, every decoded set and the held-out images, by name."""
    real, size = plan.sets, plan.sets.size
    sets = {REFERENCE: ImageSet(real.reference, size)} if real.reference else {}
    sets |= {name: ImageSet(refs_of(plan.out / "images" / name, shards), size) for name, shards in images.items()}
    if len(real.heldout) >= 2:
        sets[HELDOUT] = ImageSet(real.heldout, size)
    return sets


@dataclass(frozen=True)
class _Measurement:
    """The sets of one evaluation, and the metrics of each."""

    plan: EvaluationPlan
    sets: dict[str, ImageSet]

    @cached_property
    def sampled(self) -> dict[str, SamplerSettings]:
        """Return the settings of the sweep by the names of their images."""
        return {setting.name: setting for setting in self.plan.settings}

    @property
    def same_classes(self) -> bool:
        """Whether samples and reference have the same classes."""
        return self.plan.sets.class_names == self.plan.class_names

    @cached_property
    def reference(self) -> ReferenceInfo:
        """Return the description of the reference for the report."""
        reference, real = self.plan.reference, self.plan.sets.reference
        return ReferenceInfo(
            kind=reference.kind,
            description=reference.description,
            num_images=len(real) or None,
            content=self.sets[REFERENCE].digest if real else reference.ref.fingerprint,
        )

    @cached_property
    def comparison(self) -> Comparison:
        """Loaded when first needed: a resumed run with all results does not load the reference."""
        config = self.plan.config
        real = self.features(REFERENCE) if REFERENCE in self.sets else None
        held = self.plan.reference.statistics
        new = self._new_images if real is not None else None
        return Comparison(
            real,
            config.bootstrap,
            config.seed,
            target=None if held is None or held.pooled is None else held.pooled.target(),
            spatial_target=None if held is None or held.spatial is None else held.spatial.target(),
            new=None if new is None else self.extracted(new)[POOLED],
            in_order=config.inception_in_order,
        )

    @property
    def _new_images(self) -> str | None:
        """Return the name of images that the model has not seen, decoded as samples are if possible; None: no such."""
        if HELDOUT not in self.sets:
            return None
        return RECONSTRUCTIONS if RECONSTRUCTIONS in self.sets else HELDOUT

    def extracted(self, name: str) -> dict[str, Tensor]:
        """Return the features of a set, cached or computed now. Features of all sets may exceed the memory."""
        plan = self.plan
        return extracted(plan.pool, self.sets[name], plan.extractor, plan.config.batch_size)

    def features(self, name: str) -> Features:
        """Return the features of a set, with labels if its classes are those of the reference."""
        by_layer = self.extracted(name)
        labelled = name != NOISE and (self.same_classes or name not in self.sampled)
        labels = torch.from_numpy(self.sets[name].labels) if labelled else None
        spatial = by_layer.get(SPATIAL)
        if name != REFERENCE:
            return Features(by_layer[POOLED], by_layer.get(LOGITS), spatial, labels)
        names = [ref.name for ref in self.sets[name].refs]
        return Features(by_layer[POOLED], spatial=spatial, labels=labels, names=names)

    def key(self, name: str) -> str:
        """Return a digest of everything that determines the metrics of a set."""
        plan, config = self.plan, self.plan.config
        measured_by = [software(), plan.extractor.description.model_dump(), config.bootstrap, config.seed]
        measured_by += [config.spatial_distance, config.inception_in_order]
        new = None if self._new_images is None else self.sets[self._new_images].digest
        against = [self.reference.model_dump(), self.same_classes, new]
        return digest([measured_by, against, name, self.sets[name].digest])

    def measured(self, name: str) -> Json:
        """Return all metrics of a set, as JSON of `Measured`."""
        setting, more = self.sampled.get(name), {}
        if name == RECONSTRUCTIONS:
            originals = ImageSet(self.plan.sets.reconstructed, self.plan.sets.size)
            more["psnr"] = _psnr(originals, self.sets[name], self.plan.config)
        measured = Measured(
            name=name,
            role="samples" if setting is not None else name,
            num_images=len(self.sets[name]),
            sampler=None if setting is None else SamplerInfo(**asdict(setting)),
            **self.comparison.measure(self.features(name)),
            **more,
        )
        return measured.model_dump(mode="json")

    def spaces(self, names: Sequence[str], runner: Runner, progress: Progress) -> dict[str, SpaceDistances]:
        """Return the distances of these sets in other feature spaces; none if the reference has no images."""
        if REFERENCE not in self.sets:
            return {}
        plan, chosen = self.plan, {name: self.sets[name] for name in names}
        return measure_spaces(plan.config, self.sets[REFERENCE], chosen, (plan.out, plan.pool), runner, progress)

    def not_measured(self) -> list[str]:
        """Return what is not measured, with the reason."""
        reasons = []
        if HELDOUT not in self.sets:
            reasons.append("held-out real images (the floor): the reference has fewer than two; shard with a holdout")
        if REFERENCE not in self.sets:
            what = "kernel distance, precision, recall, density, coverage, nearest images and nearest classes"
            what += ", distances in other spaces" if self.plan.config.spaces_used else ""
            reasons.append(f"{what}: the reference is statistics, not images")
        else:
            reasons += self._not_compared()
        if self.plan.config.spaces_used and HELDOUT not in self.sets:
            reasons.append("FDr, the ratio to held-out images over all spaces: the reference has no held-out images")
        if self.plan.config.spatial_distance and REFERENCE not in self.sets and self.comparison.spatial_target is None:
            reasons.append("sFID: the reference has neither images nor statistics mu_s and sigma_s")
        if RECONSTRUCTIONS not in self.sets:
            reasons.append("reconstructions: the reference has no images, or the autoencoder no alignment yet")
        if LOGITS not in self.plan.extractor.layers:
            reasons.append("Inception Score: it needs the classes of Inception, but another extractor was chosen")
        return reasons + [
            f"effect of guidance {s.guidance:g} with {s.steps} steps: {s.guidance_mode} acts at none of their times"
            for s in self.plan.settings
            if s.guidance != 1 and not s.acts
        ]

    def _not_compared(self) -> list[str]:
        """Return what is not measured although the reference has images."""
        heldout, reasons = len(self.sets.get(HELDOUT, ())), []
        if not self.same_classes:
            reasons.append("fraction of samples nearest to their class: the reference has other classes")
        if min(map(len, self.sets.values())) <= PRECISION_NEIGHBOURS:
            reasons.append(f"precision and recall of sets of {PRECISION_NEIGHBOURS} images or fewer")
        if len(self.sets[REFERENCE]) <= DENSITY_NEIGHBOURS:
            reasons.append(f"density and coverage: the reference has {DENSITY_NEIGHBOURS} images or fewer")
        if heldout < MIN_HELDOUT:
            reasons.append(f"share of near-copies: it needs {MIN_HELDOUT} held-out images, the reference has {heldout}")
        return reasons


def _psnr(originals: ImageSet, reconstructions: ImageSet, config: EvaluationSection) -> Estimate | None:
    """Return dB, the mean over the images that are not reproduced exactly; None if all are."""
    values = [psnr(originals.pixels(i)[None], reconstructions.pixels(i)[None])[0] for i in range(len(originals))]
    finite = torch.tensor([float(value) for value in values if np.isfinite(value)], dtype=torch.float64)
    return mean_estimate(finite, config.bootstrap, config.seed) if len(finite) else None
