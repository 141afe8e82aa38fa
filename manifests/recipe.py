"""Recipes: settings of all stages, one section per stage, as frozen models. The sections define all defaults."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from .autoencoder_section import AutoencoderSection
from .dense_section import DenseProbeSection, MapsSection
from .diffusion_section import DiffusionSection
from .evaluation_section import EvaluationSection, ReconstructionSection
from .precision import Precision
from .section import Fraction, Natural, Positive, Section


class ShardSection(Section):
    """`svgpipe shard`: image folder → WebDataset tars."""

    images_per_shard: Positive = Field(1000, description="Images per tar.")
    holdout: Fraction = Field(0.0, description="Fraction of every class kept out of training.")
    crop: Positive | None = Field(
        None, description="Pixels per side of ADM centre crops stored as PNG; null: store the original bytes."
    )
    max_pixels: int = Field(
        178_956_970, gt=0, le=178_956_970, description="Images with more pixels are rejected; at most Pillow's limit."
    )
    keep_damaged: bool = Field(False, description="Keep damaged JPEGs. Parts of them may be grey.")
    seed: Natural = Field(0, description="Seed of the order of images in the tars.")


class ExtractSection(Section):
    """`svgpipe extract`: shard set → feature cache."""

    unit_rows: Positive = Field(256, description="Samples per outer Zarr shard, the unit of work and of resume.")
    batch_size: Positive = Field(64, description="Images per forward pass; does not change the features.")
    precision: Precision = Field("float32", description="float32, bfloat16, or auto: the faster one on this machine.")
    views: tuple[Literal["original", "flip"], ...] = Field(
        ("original", "flip"), description="Views to store: original, or original and flip."
    )
    calibration_images: Positive = Field(4096, description="Images that channel mean and std are measured on.")
    factor: float | None = Field(
        None,
        gt=0,
        description="Multiply all latents by this number, as SD-VAE's 0.18215; null: mean 0, std 1 per channel.",
    )
    store_dtype: Literal["float16", "int8"] = Field("float16", description="float16, or int8: less than half the size.")
    compile: bool = Field(False, description="torch.compile the encoder. Changes the last bits of the features.")

    @model_validator(mode="after")
    def _views_once(self) -> Self:
        if not self.views or len(set(self.views)) != len(self.views) or self.views[0] != "original":
            raise ValueError(f"views must begin with 'original' and name no view twice, found {list(self.views)}")
        return self


class Recipe(Section):
    """All settings of a pipeline: one section per stage, and the source of the images."""

    name: str = Field("custom", description="Name of the recipe.")
    source: str | None = Field(
        None,
        description="Images: class folders, a tar, a zip or tables. demo-photographs: the photographs of the demo.",
    )
    heldout: str | None = Field(None, description="The same for images kept out of training; null: shard.holdout.")
    heldout_labels: str | None = Field(None, description="Text file with the labels of heldout, if it has no classes.")
    unlabelled: bool = Field(False, description="All images are one class.")
    shard: ShardSection = ShardSection()
    autoencoder: AutoencoderSection = AutoencoderSection()
    extract: ExtractSection = ExtractSection()
    diffusion: DiffusionSection = DiffusionSection()
    evaluation: EvaluationSection = EvaluationSection()
    reconstruction: ReconstructionSection = ReconstructionSection()
    maps: MapsSection = MapsSection()
    dense_probe: DenseProbeSection = DenseProbeSection()
