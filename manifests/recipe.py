"""Recipes: what to build, one section per stage, as frozen models. Defaults live here and nowhere else."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from .precision import Precision

Labels = Literal["equal", "drawn"]
WEIGHTS = r"^(raw|ema|(ema-)?0(\.\d+)?)$"
MIN_RESAMPLINGS = 20  # below, a 95 % interval has no quantiles to lie between


def _enough(resamplings: int) -> int:
    if resamplings != 0 and resamplings < MIN_RESAMPLINGS:
        raise ValueError(f"expected 0, for no intervals, or at least {MIN_RESAMPLINGS}")
    return resamplings


Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Resamplings = Annotated[int, AfterValidator(_enough)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ShardSection(Section):
    """`svgpipe shard`: image folder → WebDataset tars."""

    images_per_shard: Positive = 1000
    holdout: Fraction = Field(0.0, description="Fraction of every class kept out of all training.")
    crop: Positive | None = Field(
        None, description="Store ADM centre crops of this side as PNG; null keeps the original bytes."
    )
    max_pixels: int = Field(
        178_956_970, gt=0, le=178_956_970, description="Larger images are rejected as bombs; at most Pillow's limit."
    )
    seed: Natural = Field(0, description="Of the order in which images are spread over shards.")


class BackboneSection(Section):
    """The frozen feature extractor: any timm model."""

    name: str = "vit_small_plus_patch16_dinov3.lvd1689m"
    weights: str = Field(
        "hub",
        description="hub | random | a .safetensors/.pth file in timm or Meta keys | package:NAME | beside: in the "
        "autoencoder's own directory, as import-official leaves them",
    )
    input_size: Positive | None = Field(
        None, description="Pixels per side it sees; null means the image size. Patch-14 models want 224."
    )
    feature_level: int | None = Field(
        None,
        description="CNNs: index into timm's feature_info (negative counts from the end); null for ViTs.",
    )
    seed: Natural = Field(0, description="Of random weights; ignored otherwise.")

    @property
    def is_file(self) -> bool:
        """Whether `weights` names a file."""
        return self.weights not in ("hub", "random", "beside") and not self.weights.startswith("package:")


class ResidualSection(Section):
    """The residual encoder, a timm VisionTransformer (FACTS: official values are the defaults)."""

    enabled: bool = True
    channels: Positive = 8
    depth: Positive = 6
    width: Positive = 384
    heads: Positive = 8
    mlp_ratio: float = Field(4.0, gt=0)
    dropout: Fraction = 0.1
    mask_ratio: Fraction = Field(0.1, description="Training: chance that a sample's residual is masked whole.")
    align: bool = Field(True, description="Match the residual's distribution to the backbone's.")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        return self


class DecoderSection(Section):
    """The LDM/VA-VAE decoder; its number of levels must fit the stride (levels = len(ch_mult))."""

    ch: Positive = 128
    ch_mult: tuple[Positive, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: Positive = 2
    attention: bool = Field(True, description="At the lowest resolution, as the official decoder has it.")

    @model_validator(mode="after")
    def _groups_divide(self) -> Self:
        bad = [self.ch * m for m in self.ch_mult if self.ch * m % 32]
        if bad:
            raise ValueError(f"GroupNorm has 32 groups, but widths {bad} are not multiples of 32")
        return self


class PerceptualSection(Section):
    """The perceptual term. Which one is used is a choice made here, never a silent fallback."""

    kind: Literal["lpips-vgg", "backbone"] = "lpips-vgg"
    weight: float = Field(1.0, ge=0)
    vgg_weights: str = Field("hub", description="torchvision's VGG16 file (.pth), or hub to download it.")
    lpips_weights: str = Field("hub", description="LPIPS v0.1 vgg.pth, or hub to download it.")
    levels: tuple[int, ...] = Field((0, 1, 2, 3), description="backbone: feature levels that are compared.")


class DiscriminatorSection(Section):
    """PatchGAN with adaptive weight."""

    enabled: bool = True
    start_step: Natural = Field(2500, description="In optimiser steps of the generator.")
    weight: float = Field(0.5, ge=0)
    loss: Literal["hinge", "vanilla"] = "hinge"
    width: Positive = 64
    layers: Positive = 3


class ScheduleSection(Section):
    """Learning rate over steps."""

    warmup_steps: Natural = 0
    kind: Literal["constant", "cosine"] = "constant"
    final_factor: float = Field(0.0, ge=0, le=1, description="cosine: learning rate at the end, relative.")


class AutoencoderSection(Section):
    """`svgpipe train-autoencoder`: residual encoder and decoder beside the frozen backbone."""

    image_size: Positive = 256
    backbone: BackboneSection = BackboneSection()
    residual: ResidualSection = ResidualSection()
    decoder: DecoderSection = DecoderSection()
    perceptual: PerceptualSection = PerceptualSection()
    discriminator: DiscriminatorSection = DiscriminatorSection()
    schedule: ScheduleSection = ScheduleSection()
    steps: Natural = 100_000
    batch_size: Positive = 64
    learning_rate: float = Field(1e-4, gt=0)
    crop: Literal["random", "centre"] = "random"
    flip: bool = False
    precision: Precision = "float32"
    shuffle_buffer: Positive = 2000
    workers: Natural = Field(0, description="Decoding processes beside the training process.")
    seed: Natural = 23
    log_every: Positive = 50
    eval_every: Positive = 2500
    checkpoint_every: Positive = 2500
    calibration_images: Positive = Field(2048, description="Images over which the alignment is frozen.")
    eval_images: Positive = Field(256, description="Held-out images that PSNR is measured on.")

    @model_validator(mode="after")
    def _can_train(self) -> Self:
        if self.perceptual.kind == "backbone" and self.perceptual.weight > 0 and not self.perceptual.levels:
            raise ValueError("perceptual.levels is empty, but perceptual.kind is backbone")
        return self


class ExtractSection(Section):
    """`svgpipe extract`: shard set → feature cache."""

    unit_rows: Positive = Field(256, description="Samples per outer Zarr shard: the unit of work and resume.")
    batch_size: Positive = 64
    precision: Precision = "float32"
    views: tuple[Literal["original", "flip"], ...] = ("original", "flip")
    calibration_images: Positive = Field(4096, description="Evenly spread rows that fix channel mean and std.")
    store_dtype: Literal["float16", "int8"] = "float16"
    compile: bool = Field(False, description="torch.compile the encoder; its features differ in the last bits.")

    @model_validator(mode="after")
    def _views_once(self) -> Self:
        if not self.views or len(set(self.views)) != len(self.views) or self.views[0] != "original":
            raise ValueError(f"views must begin with 'original' and name no view twice, found {list(self.views)}")
        return self


class DiTSection(Section):
    """Size of the diffusion transformer."""

    width: Positive = 384
    depth: Positive = 12
    heads: Positive = 6
    mlp_ratio: float = Field(4.0, gt=0)
    qk_norm: bool = True
    learn_sigma: bool = Field(False, description="True only to match official files: half the head is unused.")

    @model_validator(mode="after")
    def _shapes(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        if self.width % 4:
            raise ValueError(f"width {self.width} is not a multiple of 4, which the 2-D position table needs")
        return self


class DiffusionSection(Section):
    """`svgpipe train-diffusion`: the diffusion transformer, from the cache alone."""

    model: DiTSection = DiTSection()
    schedule: ScheduleSection = ScheduleSection()
    steps: Positive = 400_000
    batch_size: Positive = 256
    learning_rate: float = Field(1e-4, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    accumulate: Positive = Field(1, description="Parts that a batch is computed in; gradients are averaged.")
    ema_decays: tuple[Fraction, ...] = Field(
        (0.9999,), description="Averages of the weights, side by side; the first is the one that is looked at."
    )
    label_dropout: Fraction = 0.1
    time_shift: float = Field(0.4, gt=0, description="Below 1 pushes training times towards noise.")
    clip_grad_norm: float | None = Field(None, gt=0)
    precision: Precision = "bfloat16"
    compile: Literal["auto"] | bool = Field("auto", description="torch.compile the model; auto: on CUDA.")
    activation_checkpointing: bool = Field(False, description="Compute blocks twice, to hold less in memory.")
    use_flips: bool = Field(True, description="Draw each sample's view at random, where the cache has flips.")
    read_ahead: Positive = Field(4, description="Batches whose reads are in flight.")
    seed: Natural = 1234
    log_every: Positive = 100
    eval_every: Positive = 5000
    eval_rows: Positive = 1024
    checkpoint_every: Positive = 5000
    keep_checkpoints: Positive = Field(2, description="Newest ones, from which a run resumes.")
    keep_every: Positive | None = Field(None, description="Keep those at multiples of so many steps for ever.")
    sample_every: Positive = Field(10_000, description="Grids, only where an autoencoder is given.")
    quality_every: Positive = Field(10_000, description="Distance and class accuracy of samples in latent space.")
    quality_samples: int = Field(1024, ge=0, description="Samples that these are measured on; 0: never.")
    quality_rows: int = Field(8192, ge=2, description="Cached rows that they are measured against.")
    sample_steps: Positive = Field(25, description="Of grids and of what quality is measured on.")
    sample_shift: float = Field(0.15, gt=0)

    @model_validator(mode="after")
    def _averages_and_parts(self) -> Self:
        if not self.ema_decays or len(set(self.ema_decays)) != len(self.ema_decays):
            raise ValueError(f"ema_decays must name at least one value and none twice, found {list(self.ema_decays)}")
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate {self.accumulate} is more than batch_size {self.batch_size}")
        return self


class ExtractorSection(Section):
    """What distances are measured with."""

    kind: Literal["inception", "backbone", "timm"] = Field(
        "inception", description="torch-fidelity's Inception, the autoencoder's own backbone, or any timm model."
    )
    weights: str = Field(
        "hub",
        description="inception: torch-fidelity's file, or hub to download it; timm: as backbone.weights.",
    )
    name: str | None = Field(None, description="timm: name of the model.")

    @model_validator(mode="after")
    def _named(self) -> Self:
        if (self.kind == "timm") != (self.name is not None):
            raise ValueError("name is the timm model's, and belongs to kind timm alone")
        return self


class EvaluationSection(Section):
    """`svgpipe sample-and-eval`: a sweep of steps × guidance, decoded and measured."""

    steps: tuple[Annotated[int, Field(gt=0, le=100_000)], ...] = (25,)
    guidance: tuple[float, ...] = (1.0,)
    solver: Literal["euler", "heun", "multistep"] = Field(
        "euler", description="Evaluations a step: one, two, and one of second order."
    )
    guidance_mode: str = Field(
        "constant", description="constant, interval-LO-HI, linear, late, early-R or cfg_star-K-R."
    )
    labels: Labels = Field("equal", description="Per class, or drawn with the seed.")
    time_shift: float = Field(0.15, gt=0)
    num_samples: int = Field(50_000, ge=2)
    batch_size: Positive = 125
    unit_rows: Positive = Field(500, description="Samples per latent shard and per tar: the unit of resume.")
    precision: Precision = "bfloat16"
    weights: str = Field(
        "ema",
        pattern=WEIGHTS,
        description="ema (the first average), ema-DECAY or raw.",
    )
    guide_weights: str = Field("ema", pattern=WEIGHTS, description="Of the model that --guide names.")
    compile: Literal["auto"] | bool = Field("auto", description="torch.compile the model; auto: on CUDA.")
    extractor: ExtractorSection = ExtractorSection()
    reference_images: int | None = Field(None, ge=2, description="At most this many, evenly spread; null: all.")
    bootstrap: Resamplings = Field(100, description="Times that images are resampled for the intervals; 0: none.")
    seed: Natural = 0

    @model_validator(mode="after")
    def _sweep(self) -> Self:
        if not self.steps or not self.guidance:
            raise ValueError("steps and guidance must each name at least one value")
        for name, values in (("steps", self.steps), ("guidance", self.guidance)):
            if len({f"{value:g}" for value in values}) != len(values):
                raise ValueError(f"{name} must name no value twice, found {list(values)}")
        return self


class ReconstructionSection(Section):
    """`svgpipe eval-reconstruction`: what the autoencoder loses, on held-out images."""

    num_images: int | None = Field(None, ge=2, description="At most this many, evenly spread; null: all held-out.")
    batch_size: Positive = 32
    unit_rows: Positive = Field(500, description="Images per tar: the unit of resume.")
    extractor: ExtractorSection = ExtractorSection()
    vgg_weights: str = Field("hub", description="Of LPIPS: torchvision's VGG16 file (.pth), or hub to download it.")
    lpips_weights: str = Field("hub", description="LPIPS v0.1 vgg.pth, or hub to download it.")
    bootstrap: Resamplings = Field(100, description="Times that images are resampled for the intervals; 0: none.")
    seed: Natural = 0


class Recipe(Section):
    """One section per stage, plus where the images come from."""

    name: str = "custom"
    source: str | None = Field(None, description="Image folder, or demo-photographs.")
    shard: ShardSection = ShardSection()
    autoencoder: AutoencoderSection = AutoencoderSection()
    extract: ExtractSection = ExtractSection()
    diffusion: DiffusionSection = DiffusionSection()
    evaluation: EvaluationSection = EvaluationSection()
    reconstruction: ReconstructionSection = ReconstructionSection()
