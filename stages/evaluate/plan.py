"""The plan of an evaluation, resolved before it starts. Sampling, decoding and measuring follow it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from svgpipe.manifests.evaluation import EvaluationManifest
from svgpipe.manifests.evaluation_section import EvaluationSection
from svgpipe.manifests.filesystem import Location
from svgpipe.manifests.manifest import InputRef
from svgpipe.manifests.model_manifests import AutoencoderManifest, DiffusionManifest, require_decoder
from svgpipe.manifests.workdir import StageSpec

from ..networks.diffusion import open_diffusion
from ..networks.guided_model import GuidedModel
from ..networks.sampling import SamplerSettings
from .features import Extractor, extractor_for, weight_inputs
from .reference import RealSets, Reference, require_extractor


@dataclass(frozen=True)
class EvaluationPlan:
    """Inputs, settings and directories of one evaluation."""

    out: Location
    pool: Location  # holds `latents` and `features`, which evaluations share
    config: EvaluationSection
    diffusion: DiffusionManifest
    autoencoder: Location
    encoder: AutoencoderManifest
    sampler: GuidedModel
    settings: tuple[SamplerSettings, ...]
    reference: Reference
    inputs: dict[str, InputRef]

    @classmethod
    def resolve(
        cls,
        diffusion: Location,
        autoencoder: Location,
        reference: Reference,
        out: Location,
        config: EvaluationSection,
        *,
        guide: Location | None = None,
        pool: Location | None = None,
    ) -> EvaluationPlan:
        """Open all inputs and check that they match.

        Returns:
            The plan.

        Raises:
            MismatchError: the autoencoder did not make the cache, or the guide has other latents.
            ArtifactError: an input is missing or damaged.
            UsageError: an unknown guidance mode or unknown weights.
        """
        manifest = DiffusionManifest.read(diffusion)
        sampler = GuidedModel(open_diffusion(diffusion), None if guide is None else open_diffusion(guide))
        sampler.require_match()
        encoder = require_decoder(
            str(diffusion),
            manifest.inputs["cache"].inputs.get("autoencoder"),
            (*manifest.grid, manifest.channels),
            autoencoder,
            "Sample with the autoencoder that extracted the cache; another one decodes to noise.",
        )
        inputs = {
            "diffusion": manifest.as_input(diffusion),
            "autoencoder": encoder.as_input(autoencoder),
            "reference": reference.ref,
            **sampler.guide_input(config),
            **weight_inputs(extractor=config.extractor.weights, **config.spaces_used),
        }
        return cls(
            out=out,
            pool=pool or out.parent,
            config=config,
            diffusion=manifest,
            autoencoder=autoencoder,
            encoder=encoder,
            sampler=sampler,
            settings=tuple(sampler.settings(config)),
            reference=reference,
            inputs=inputs,
        )

    @cached_property
    def extractor(self) -> Extractor:
        """The feature extractor, loaded when first needed.

        Raises:
            ArtifactError: weights are not available.
            UsageError: the reference is statistics of other features.
        """
        config = self.config
        extractor = extractor_for(config.extractor, self.encoder, self.autoencoder, spatial=config.spatial_distance)
        require_extractor(self.reference, extractor.dimensions, extractor.space)
        return extractor

    @cached_property
    def sets(self) -> RealSets:
        """The real images that are measured."""
        return RealSets.of(self.reference, self.config, self.encoder.image_size)

    @property
    def deviations(self) -> list[str]:
        """What differs from the preset and the protocol of the recipe."""
        found = self.config.deviations()
        held = self.reference.statistics
        if self.config.protocol == "adm" and (held is None or held.spatial is None or not self.reference.images):
            found.append(f"reference: {self.reference.description} instead of an .npz with statistics and images")
        return found

    @property
    def spec(self) -> StageSpec[EvaluationManifest]:
        """What `sample_and_eval` is asked to make."""
        return StageSpec(self.out, EvaluationManifest, self.config.model_dump(mode="json"), self.inputs)

    @property
    def class_names(self) -> list[str]:
        """Class names of the diffusion model, in label order."""
        return self.diffusion.class_names
