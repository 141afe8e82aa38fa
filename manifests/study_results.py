"""study.json: the numbers of all variants of a study, read from their finished artifacts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationError

from .errors import ArtifactError
from .estimate import Estimate
from .filesystem import Location
from .manifest import FrozenModel, read_json, summarise, write_json
from .study import PaperColumn

RESULTS_NAME = "study.json"


class Sampled(FrozenModel):
    """Distances of the samples of one setting."""

    steps: int
    guidance: float
    frechet_distance: Estimate
    precision: Estimate | None
    recall: Estimate | None
    class_accuracy: Estimate | None


class CurvePoint(FrozenModel):
    """One measurement during training."""

    step: int
    value: float


class TokenizerResult(FrozenModel):
    """One tokenizer: latents, reconstruction, and what a probe finds in the latents."""

    kind: str
    latent: tuple[int, int, int] = Field(description="rows, columns, channels")
    bytes_per_image: float = Field(description="Of the cache, per image and view.")
    psnr: Estimate | None
    ssim: Estimate | None
    reconstruction_distance: Estimate | None = Field(description="Fréchet distance of reconstructions.")
    linear_probe: Estimate | None = Field(description="Top-1 accuracy from latents averaged over the grid.")
    training_seconds: float
    extraction_seconds: float
    extraction_rate: float | None = Field(description="Images per second once under way; null if too short.")
    vision_features_copied: bool = Field(
        False, description="Whether the extraction copied its vision features from another cache of the study."
    )


class VariantResult(FrozenModel):
    """One variant of a study."""

    name: str
    title: str
    state: Literal["finished", "failed", "unfinished"]
    message: str | None = Field(None, description="Why it failed.")
    paper: PaperColumn | None = None
    tokenizer: TokenizerResult | None = None
    parameters: int | None = Field(None, description="Of the transformer.")
    training_steps: int | None = None
    epochs: float | None = None
    training_rate: float | None = Field(None, description="Samples per second, median of the log.")
    training_seconds: float | None = None
    evaluation_seconds: float | None = None
    heldout_loss: list[CurvePoint] = Field(default_factory=list)
    latent_distance: list[CurvePoint] = Field(
        default_factory=list, description="Fréchet distance of pooled latents, over that of real rows."
    )
    velocity_agreement: Estimate | None = Field(None, description="Fields of two classes / of two halves of one.")
    curvature: Estimate | None = Field(None, description="Of the sampling paths; 0: straight.")
    one_step_error: Estimate | None = None
    samples: list[Sampled] = Field(default_factory=list)


class StudyResults(FrozenModel):
    """Content of study.json."""

    schema_version: int = 1
    name: str
    metric: str | None = Field(None, description="FID, or a Fréchet distance in a named feature space.")
    num_samples: int
    reference: str | None = None
    heldout_distance: Estimate | None = Field(None, description="Distance of held-out real images: the floor.")
    noise_distance: Estimate | None = Field(None, description="Largest distance of decoded noise: the ceiling.")
    variants: list[VariantResult]

    @classmethod
    def read(cls, workdir: Location) -> StudyResults:
        """Return the results in the working directory of a study.

        Raises:
            ArtifactError: study.json is missing or damaged.
        """
        path = workdir / RESULTS_NAME
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as error:
            raise ArtifactError(f"{path}: not the results of a study: {summarise(error)}.") from error

    def write(self, workdir: Location) -> None:
        """Write study.json."""
        write_json(workdir / RESULTS_NAME, self.model_dump(mode="json"))
