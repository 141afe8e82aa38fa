"""Recipes: settings of all stages, one section per stage, as frozen models. All defaults are defined here."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from .precision import Precision
from .presets import NAMES as PRESETS
from .presets import Preset, preset_values
from .section import Section

Labels = Literal["equal", "drawn"]
Objective = Literal["flow", "ddpm"]
AutoencoderKind = Literal["svg", "vision", "kl", "aligned-kl"]
WEIGHTS = r"^(raw|ema|(ema-)?0(\.\d+)?|power-0\.\d+)$"
MIN_RESAMPLINGS = 20  # fewer have no quantiles for a 95 % interval


def _enough(resamplings: int) -> int:
    if resamplings != 0 and resamplings < MIN_RESAMPLINGS:
        raise ValueError(f"expected 0 (no intervals) or at least {MIN_RESAMPLINGS}")
    return resamplings


def _shift(value: object) -> object:
    if value != "from-dimension" and not (isinstance(value, int | float) and value > 0):
        raise ValueError("expected a number above 0, or from-dimension")
    return value


Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Resamplings = Annotated[int, AfterValidator(_enough)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
TimeShift = Annotated[float | Literal["from-dimension"], BeforeValidator(_shift)]


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


class BackboneSection(Section):
    """The frozen vision model: any timm model. svg and vision encode with it, aligned-kl is trained towards it."""

    name: str = Field("vit_small_plus_patch16_dinov3.lvd1689m", description="timm model: a ViT or a CNN.")
    weights: str = Field(
        "hub",
        description="hub, random, package:NAME, a .safetensors/.pth file in timm's or Meta's keys, or beside (the file "
        "that import-official stored next to the autoencoder).",
    )
    input_size: Positive | None = Field(
        None, description="Pixels per side of the backbone's input; null: image_size. Patch-14 models need 224."
    )
    feature_level: int | None = Field(
        None,
        description="CNNs: index into timm's feature_info, negative from the end. ViTs: null.",
    )
    layers: tuple[Natural, ...] | None = Field(
        None, description="ViTs: blocks, from 0, whose normalised outputs are combined; null: the last."
    )
    last: Positive | None = Field(None, description="ViTs: this many of the last blocks are combined. Not with layers.")
    combine: Literal["mean", "concat"] | None = Field(
        None, description="Blocks are averaged, or their channels are concatenated; null: mean."
    )
    spatial_mean: bool = Field(
        False, description="The mean over the grid of the last of these blocks is added to every cell (RAEv2)."
    )
    seed: Natural = Field(0, description="Seed of random weights.")

    @model_validator(mode="after")
    def _blocks(self) -> Self:
        if self.layers is not None and self.last is not None:
            raise ValueError("give layers or last, not both")
        if self.layers is not None and (not self.layers or len(set(self.layers)) < len(self.layers)):
            raise ValueError(f"layers: expected numbers of blocks, each once, found {list(self.layers)}")
        if not self.combines and (self.combine or self.spatial_mean):
            raise ValueError("combine and spatial_mean need layers or last")
        return self

    @property
    def title(self) -> str:
        """Name of the model, with the blocks that are combined."""
        if not self.combines:
            return self.name
        plus = " plus the mean over the grid" if self.spatial_mean else ""
        if self.layers is not None and len(self.layers) == 1:
            return f"{self.name}, block {self.layers[0]}{plus}"
        blocks = f"the last {self.last} blocks" if self.layers is None else f"blocks {', '.join(map(str, self.layers))}"
        return f"{self.name}, {self.combine or 'mean'} of {blocks}{plus}"

    @property
    def combines(self) -> bool:
        """Whether blocks of a ViT are named."""
        return self.layers is not None or self.last is not None

    @property
    def is_file(self) -> bool:
        """Whether `weights` names a file."""
        return self.weights not in ("hub", "random", "beside") and not self.weights.startswith("package:")


class ResidualSection(Section):
    """The residual encoder of kind svg, a timm VisionTransformer. The defaults are the official values."""

    channels: Positive = Field(8, description="Residual channels.")
    depth: Positive = Field(6, description="Number of transformer blocks.")
    width: Positive = Field(384, description="Width of the transformer.")
    heads: Positive = Field(8, description="Attention heads.")
    mlp_ratio: float = Field(4.0, gt=0, description="MLP width / width.")
    dropout: Fraction = Field(0.1, description="Dropout in training.")
    mask_ratio: Fraction = Field(0.1, description="Training: probability that the residual of a sample is masked.")
    align: bool = Field(True, description="Match mean and std of the residual to those of the backbone features.")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        return self


class KLSection(Section):
    """Latents of the kinds kl and aligned-kl."""

    channels: Positive = Field(4, description="Channels of a latent. SD-VAE has 4, VA-VAE 32.")
    weight: float = Field(1e-6, ge=0, description="Weight of the KL divergence, a sum over the latent of an image.")


class VisionLossSection(Section):
    """The loss of kind aligned-kl that pulls latents towards the features of the vision model (VF loss)."""

    weight: float = Field(0.1, ge=0, description="Weight of the loss.")
    adaptive: bool = Field(True, description="Multiply the weight by the ratio of gradients at the encoder's end.")
    distance_margin: float = Field(
        0.25, ge=0, description="Difference of cosines between positions that costs nothing."
    )
    cosine_margin: float = Field(0.5, ge=0, description="Difference to cosine 1 that costs nothing.")


class ViTDecoderSection(Section):
    """RAE's decoder, a vision transformer over the cells of the latent. The defaults are its ViT-XL."""

    width: Positive = Field(1152, description="Width of the transformer.")
    depth: Positive = Field(28, description="Number of transformer blocks.")
    heads: Positive = Field(16, description="Attention heads.")
    mlp_width: Positive = Field(4096, description="Hidden width of the MLPs.")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads} and by 4")
        return self


class DecoderSection(Section):
    """The LDM / VA-VAE decoder; for kl and aligned-kl also the encoder, its mirror image.

    kl and aligned-kl have the stride 2^(levels - 1). For svg and vision, the levels must match the backbone's stride.
    """

    ch: Positive = Field(128, description="Channels at the highest resolution.")
    ch_mult: tuple[Positive, ...] = Field(
        (1, 1, 2, 2, 4), description="Channel multiplier of each level, highest resolution first."
    )
    num_res_blocks: Positive = Field(2, description="Residual blocks per level.")
    attention: bool = Field(
        True, description="Attention in every block of the lowest level; it is always in the middle."
    )
    vit: ViTDecoderSection | None = Field(
        None, description="svg, vision: RAE's decoder, a vision transformer, instead of convolutions; null: none."
    )

    @model_validator(mode="after")
    def _groups_divide(self) -> Self:
        bad = [self.ch * m for m in self.ch_mult if self.ch * m % 32]
        if bad:
            raise ValueError(f"GroupNorm has 32 groups, but widths {bad} are not multiples of 32")
        return self


class PerceptualSection(Section):
    """The perceptual loss."""

    kind: Literal["lpips-vgg", "backbone"] = Field(
        "lpips-vgg", description="lpips-vgg, or backbone: features of the frozen backbone."
    )
    weight: float = Field(1.0, ge=0, description="Weight of the perceptual loss.")
    vgg_weights: str = Field("hub", description="lpips-vgg: torchvision's VGG16 file (.pth), or hub: download it.")
    lpips_weights: str = Field("hub", description="lpips-vgg: LPIPS v0.1 vgg.pth, or hub: download it.")
    levels: tuple[int, ...] = Field((0, 1, 2, 3), description="backbone: feature levels that are compared.")


class DiscriminatorSection(Section):
    """PatchGAN discriminator with adaptive weight."""

    enabled: bool = Field(True, description="False: no adversarial loss.")
    start_step: Natural = Field(2500, description="First step with the adversarial loss.")
    weight: float = Field(0.5, ge=0, description="Weight of the adversarial loss.")
    loss: Literal["hinge", "vanilla"] = Field("hinge", description="hinge or vanilla.")
    width: Positive = Field(64, description="Channels of the first layer.")
    layers: Positive = Field(3, description="Number of strided layers.")


class ScheduleSection(Section):
    """Learning rate over steps."""

    warmup_steps: Natural = Field(0, description="Steps of linear warm-up.")
    kind: Literal["constant", "cosine"] = Field("constant", description="constant or cosine.")
    final_factor: float = Field(0.0, ge=0, le=1, description="cosine: final learning rate / learning_rate.")


class AutoencoderSection(Section):
    """`svgpipe train-autoencoder`: the tokenizer."""

    kind: AutoencoderKind = Field(
        "svg",
        description="svg: frozen backbone and residual encoder; vision: frozen backbone alone; kl: VAE, as SD-VAE; "
        "aligned-kl: VAE with the VF loss, as VA-VAE.",
    )
    image_size: Positive = Field(256, description="Pixels per side of the images.")
    backbone: BackboneSection = BackboneSection()
    residual: ResidualSection = ResidualSection()
    kl: KLSection = KLSection()
    vision_loss: VisionLossSection = VisionLossSection()
    decoder: DecoderSection = DecoderSection()
    decoder_noise: float | None = Field(
        None,
        gt=0,
        description="svg, vision: the decoder is trained with noise on its input, of a deviation per image that is "
        "uniform between 0 and this number of deviations of the channel (RAE: 0.8); null: none.",
    )
    perceptual: PerceptualSection = PerceptualSection()
    discriminator: DiscriminatorSection = DiscriminatorSection()
    schedule: ScheduleSection = ScheduleSection()
    steps: Natural = Field(100_000, description="Optimizer steps.")
    batch_size: Positive = Field(64, description="Images per step, over all workers.")
    learning_rate: float = Field(1e-4, gt=0, description="Learning rate of Adam.")
    crop: Literal["random", "centre"] = Field("random", description="Training crop: random or centre.")
    flip: bool = Field(False, description="Flip training images at random.")
    precision: Precision = Field("float32", description="float32, bfloat16, or auto: the faster one on this machine.")
    shuffle_buffer: Positive = Field(2000, description="Images in the shuffle buffer.")
    workers: Natural = Field(0, description="Image decoding processes per training process.")
    seed: Natural = Field(23, description="Seed of weights, order and crops.")
    log_every: Positive = Field(50, description="Steps between log lines.")
    eval_every: Positive = Field(2500, description="Steps between measurements on held-out images.")
    checkpoint_every: Positive = Field(2500, description="Steps between checkpoints.")
    calibration_images: Positive = Field(2048, description="Images that the alignment is measured on.")
    eval_images: Positive = Field(256, description="Held-out images that PSNR is measured on.")

    @model_validator(mode="after")
    def _can_train(self) -> Self:
        if self.perceives_with_backbone and not self.perceptual.levels:
            raise ValueError("perceptual.levels is empty, but perceptual.kind is backbone")
        if self.decoder_noise is not None and not self.encodes_with_backbone:
            raise ValueError(f"decoder_noise: kind {self.kind} draws its latents from a posterior; expected null")
        if self.decoder.vit is not None and not self.encodes_with_backbone:
            raise ValueError(f"decoder.vit: the decoder of kind {self.kind} mirrors its encoder; expected null")
        return self

    @property
    def encodes_with_backbone(self) -> bool:
        """Whether the backbone is part of the encoder."""
        return self.kind in ("svg", "vision")

    @property
    def perceives_with_backbone(self) -> bool:
        """Whether the perceptual loss needs the backbone."""
        return self.perceptual.kind == "backbone" and self.perceptual.weight > 0

    @property
    def trains_with_backbone(self) -> bool:
        """Whether the training needs the backbone, if only for a loss."""
        return self.encodes_with_backbone or self.kind == "aligned-kl" or self.perceives_with_backbone


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


class WideHeadSection(Section):
    """A wide head after the transformer (DDT), which sees the latents again. For features, not for latents of a VAE."""

    width: Positive = Field(2048, description="Width of its tokens.")
    depth: Positive = Field(2, description="Number of its blocks.")
    heads: Positive = Field(16, description="Attention heads.")


class DiTSection(Section):
    """Size of the diffusion transformer."""

    width: Positive = Field(384, description="Width of the transformer.")
    depth: Positive = Field(12, description="Number of transformer blocks.")
    heads: Positive = Field(6, description="Attention heads.")
    mlp_ratio: float = Field(4.0, gt=0, description="MLP width / width.")
    qk_norm: bool = Field(True, description="Normalise queries and keys.")
    learn_sigma: bool = Field(
        False,
        description="Twice the output. DDPM: the second half is the variance; flow: unused, to load official files.",
    )
    patch_size: Positive | None = Field(
        None, description="Rows and columns of grid cells in a token; null: 1. DiT and SiT on SD-VAE latents have 2."
    )
    time_scale: float | None = Field(
        None, gt=0, description="Times are multiplied by this number before their features; null: 1. Not for ddpm."
    )
    rms_norm: bool = Field(False, description="RMSNorm with weights instead of LayerNorm without.")
    swiglu: bool = Field(False, description="SwiGLU with 2/3 of the width instead of the GELU MLP.")
    rope: bool = Field(False, description="Rotary positions, beside the fixed position table.")
    fourier_time: bool = Field(False, description="Random Fourier features of the time, as RAE, instead of cosines.")
    wide_head: WideHeadSection | None = Field(
        None, description="Wide blocks after the others, for tokens with more channels than width; null: none."
    )
    auxiliary_depth: Positive | None = Field(
        None, description="Block after which an auxiliary head is trained, for internal guidance; null: none."
    )

    @model_validator(mode="after")
    def _shapes(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")
        if self.width % 4:
            raise ValueError(f"width {self.width} is not a multiple of 4, as the 2-D position embedding needs")
        if self.rope and self.width // self.heads % 4:
            raise ValueError(f"a head has {self.width // self.heads} channels; rope needs a multiple of 4")
        if (self.auxiliary_depth or 0) >= self.depth:
            raise ValueError(f"auxiliary_depth {self.auxiliary_depth} is not a block before the last one, {self.depth}")
        if (wide := self.wide_head) is not None:
            if wide.width % wide.heads:
                raise ValueError(f"wide_head: width {wide.width} is not divisible by heads {wide.heads}")
            if self.rope and wide.width // wide.heads % 4:
                raise ValueError(f"wide_head: {wide.width // wide.heads} channels a head; rope needs a multiple of 4")
        return self


class AlignSection(Section):
    """Representation alignment: tokens inside the model are drawn towards features of a vision model."""

    depth: Positive = Field(8, description="Tokens after this block are aligned, counted from 1.")
    projector: Literal["mlp", "conv"] = Field("mlp", description="mlp: three layers (REPA); conv: 3x3 (iREPA).")
    width: Positive = Field(2048, description="mlp: width of its two hidden layers.")
    coefficient: float = Field(0.5, gt=0, description="Weight of the loss. REPA: 0.5, iREPA: 1.")
    zscore: bool = Field(False, description="Normalise the features of an image over its grid (iREPA).")


class PowerAverageSection(Section):
    """Averages with power functions of the step (EDM2), from which `svgpipe ema` makes averages of other lengths."""

    sigmas: tuple[Annotated[float, Field(ge=0.005, lt=0.28)], ...] = Field(
        (0.05, 0.10), description="Lengths of the averages, relative to the training. Each needs memory for a model."
    )
    every: Positive = Field(5000, description="Steps between snapshots of the averages, float16 files in averages/.")

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        if len(set(self.sigmas)) != len(self.sigmas) or not self.sigmas:
            raise ValueError(f"sigmas must name at least one value and no value twice, found {list(self.sigmas)}")
        return self


class DiffusionSection(Section):
    """`svgpipe train-diffusion`: the diffusion transformer, from the cache alone."""

    model: DiTSection = DiTSection()
    objective: Objective = Field(
        "flow", description="flow: velocity of a straight path; ddpm: noise and variance, as DiT."
    )
    schedule: ScheduleSection = ScheduleSection()
    steps: Positive = Field(400_000, description="Optimizer steps.")
    batch_size: Positive = Field(256, description="Samples per step, over all workers.")
    learning_rate: float = Field(1e-4, gt=0, description="Learning rate of AdamW.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of AdamW.")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.999), description="Betas of AdamW.")
    accumulate: Positive = Field(1, description="Number of parts that a batch is computed in, to save memory.")
    ema_decays: tuple[Fraction, ...] = Field(
        (0.9999,), description="EMA decays of the weights, kept side by side. The first is the default for sampling."
    )
    power_averages: PowerAverageSection | None = Field(
        None, description="Also keep averages whose length is chosen after the training (svgpipe ema); null: none."
    )
    label_dropout: Fraction = Field(0.1, description="Fraction of labels replaced by 'no class', for guidance.")
    time_shift: TimeShift = Field(
        0.4,
        description="Below 1: training times move towards the noise. from-dimension: sqrt(4096 / values of a latent).",
    )
    logit_normal_time: bool = Field(
        False, description="Training times are logit-normal, not uniform, before the shift."
    )
    predict_data: bool = Field(
        False, description="The model predicts the data, not the velocity; the loss is still that of the velocity."
    )
    cosine_loss: bool = Field(False, description="Add 1 - cosine of predicted and true velocity to the loss.")
    align: AlignSection | None = Field(
        None, description="Alignment with the cache of --align, or with the cache itself; null: none."
    )
    clip_grad_norm: float | None = Field(None, gt=0, description="Maximum gradient norm; null: no clipping.")
    precision: Precision = Field("bfloat16", description="float32, bfloat16, or auto: the faster one on this machine.")
    compile: Literal["auto"] | bool = Field("auto", description="torch.compile the model. auto: on CUDA.")
    activation_checkpointing: bool = Field(False, description="Recompute blocks in the backward pass, to save memory.")
    use_flips: bool = Field(True, description="Draw the view of each sample at random, if the cache has flips.")
    read_ahead: Positive = Field(4, description="Batches that are read in advance.")
    shuffle_files: Positive | None = Field(
        None, description="Shuffle within blocks of this many files of the cache (--local-cache); null: all rows."
    )
    seed: Natural = Field(1234, description="Seed of weights, order, noise and times.")
    log_every: Positive = Field(100, description="Steps between log lines.")
    eval_every: Positive = Field(5000, description="Steps between measurements of the held-out loss.")
    eval_rows: Positive = Field(1024, description="Held-out rows for that loss.")
    checkpoint_every: Positive = Field(5000, description="Steps between checkpoints.")
    keep_checkpoints: Positive = Field(2, description="Number of newest checkpoints to keep.")
    keep_every: Positive | None = Field(
        None, description="Also keep checkpoints at multiples of this step, permanently."
    )
    sample_every: Positive = Field(10_000, description="Steps between sample grids. Needs --autoencoder.")
    quality_every: Positive = Field(10_000, description="Steps between measurements of samples in latent space.")
    quality_samples: int = Field(1024, ge=0, description="Samples of each such measurement; 0: never measure.")
    quality_rows: int = Field(8192, ge=2, description="Cached rows that these samples are compared with.")
    sample_steps: Positive = Field(25, description="Sampling steps of grids and of measurements during training.")
    sample_shift: TimeShift = Field(0.15, description="Time shift of that sampling, see evaluation.time_shift.")

    @model_validator(mode="after")
    def _averages_and_parts(self) -> Self:
        if not self.ema_decays or len(set(self.ema_decays)) != len(self.ema_decays):
            raise ValueError(
                f"ema_decays must name at least one value and no value twice, found {list(self.ema_decays)}"
            )
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate {self.accumulate} is more than batch_size {self.batch_size}")
        return self

    @model_validator(mode="after")
    def _objective_fits(self) -> Self:
        if self.objective == "ddpm" and not self.model.learn_sigma:
            raise ValueError("objective ddpm learns the variance: set model.learn_sigma=true")
        if self.objective == "ddpm" and self.model.time_scale is not None:
            raise ValueError("model.time_scale belongs to objective flow: the times of ddpm are numbers of steps")
        of_flow = ("logit_normal_time", "cosine_loss", "predict_data")
        given = [name for name in of_flow if getattr(self, name)]
        given += ["model.auxiliary_depth"] if self.model.auxiliary_depth is not None else []
        if self.objective == "ddpm" and given:
            verb = "belong" if len(given) > 1 else "belongs"
            raise ValueError(f"{' and '.join(given)} {verb} to objective flow, not to ddpm")
        return self


class ExtractorSection(Section):
    """The feature extractor of the metrics."""

    kind: Literal["inception", "backbone", "timm"] = Field(
        "inception",
        description="inception (torch-fidelity's), backbone (of the autoencoder), or timm (any timm model).",
    )
    weights: str = Field(
        "hub",
        description="inception: torch-fidelity's file, or hub: download it. timm: as backbone.weights.",
    )
    name: str | None = Field(None, description="timm: name of the model.")
    input_size: Positive | None = Field(
        None, description="timm: pixels per side that images are resized to; null: the model's own."
    )

    @model_validator(mode="after")
    def _of_timm(self) -> Self:
        if (self.kind == "timm") != (self.name is not None):
            raise ValueError("name is the name of a timm model: required for kind timm, not allowed for other kinds")
        if self.kind != "timm" and self.input_size is not None:
            raise ValueError(f"input_size belongs to kind timm, found kind {self.kind}")
        return self


class SDESection(Section):
    """The solver sde, Euler-Maruyama. The defaults are those of SiT's script and of REPA."""

    diffusion: Literal["sigma", "decreasing"] = Field(
        "sigma", description="Noise at time t: sigma (1 - t), or decreasing ((1 + cos(pi t))^2 / 4)."
    )
    last_step: Literal["mean", "euler"] = Field(
        "mean", description="Last step, without noise: mean (along the drift), or euler (along the velocity alone)."
    )
    last_step_size: float = Field(0.04, ge=1e-4, lt=1, description="Size of the last step, before time_shift.")


class EvaluationSection(Section):
    """`svgpipe sample-and-eval`: a sweep of steps × guidance, decoded and measured."""

    preset: Preset | None = Field(
        None, description=f"Settings that published numbers were made with: {', '.join(PRESETS)}; null: none."
    )
    steps: tuple[Annotated[int, Field(gt=0, le=100_000)], ...] = Field((25,), description="Numbers of sampling steps.")
    guidance: tuple[Annotated[float, Field(ge=0)], ...] = Field((1.0,), description="Guidance scales; 1: no guidance.")
    solver: Literal["euler", "heun", "multistep", "sde", "dopri5", "ddpm", "ddim"] = Field(
        "euler",
        description="euler; heun: two evaluations per step; multistep: second order, one evaluation per step; "
        "sde: Euler-Maruyama; dopri5: chooses the steps of every sample. ddpm, ddim: for models of objective ddpm.",
    )
    ddim_eta: float | None = Field(None, ge=0, le=1, description="ddim: share of noise in the steps; null: 0.")
    sde: SDESection | None = Field(None, description="Settings of the solver sde; null: those of SiT and REPA.")
    guidance_mode: str = Field(
        "constant", description="constant, interval-LO-HI, linear, late, early-R or cfg_star-K-R."
    )
    guidance_channels: Positive | None = Field(
        None, description="Guide the first channels only; null: all. DiT, SiT and LightningDiT guide 3."
    )
    internal_guidance: bool = Field(
        False,
        description="Guide with the model's auxiliary head (diffusion.model.auxiliary_depth) instead of the null "
        "label, without a second evaluation.",
    )
    labels: Labels = Field("equal", description="equal: same number per class; drawn: at random, with the seed.")
    time_shift: TimeShift = Field(
        0.15,
        description="Below 1: more steps near the noise; 1: equal steps. from-dimension: sqrt(4096 / values of a "
        "latent).",
    )
    num_samples: int = Field(50_000, ge=2, description="Samples per setting.")
    batch_size: Positive = Field(125, description="Samples per forward pass; does not change the samples.")
    unit_rows: Positive = Field(500, description="Samples per latent shard and per tar, the unit of resume.")
    precision: Precision = Field("bfloat16", description="float32, bfloat16, or auto: the faster one on this machine.")
    weights: str = Field(
        "ema",
        pattern=WEIGHTS,
        description="ema (the first decay), ema-DECAY, power-SIGMA (see svgpipe ema) or raw.",
    )
    guide_weights: str = Field("ema", pattern=WEIGHTS, description="Weights of the --guide model.")
    compile: Literal["auto"] | bool = Field("auto", description="torch.compile the model. auto: on CUDA.")
    extractor: ExtractorSection = ExtractorSection()
    reference_images: int | None = Field(None, ge=2, description="Maximum number of reference images; null: all.")
    bootstrap: Resamplings = Field(100, description="Bootstrap resamplings for the intervals; 0: no intervals.")
    seed: Natural = Field(0, description="Seed of noise, drawn labels and bootstrap.")

    @model_validator(mode="after")
    def _sweep(self) -> Self:
        if self.ddim_eta is not None and self.solver != "ddim":
            raise ValueError(f"ddim_eta belongs to solver ddim, found {self.solver}")
        if self.sde is not None and self.solver != "sde":
            raise ValueError(f"sde holds settings of solver sde, found solver {self.solver}")
        if not self.steps or not self.guidance:
            raise ValueError("steps and guidance must each name at least one value")
        for name, values in (("steps", self.steps), ("guidance", self.guidance)):
            if len({f"{value:g}" for value in values}) != len(values):
                raise ValueError(f"{name} must name no value twice, found {list(values)}")
        return self

    def preset_keys(self) -> set[str]:
        """Return the keys that are as the preset sets them."""
        values = {} if self.preset is None else preset_values(self.preset)
        wanted = EvaluationSection.model_validate(values)
        return {key for key in values if getattr(self, key) == getattr(wanted, key)}

    def deviations(self) -> list[str]:
        """Return what differs from the preset: `steps: [25] instead of [250]`."""
        if self.preset is None:
            return []
        values = preset_values(self.preset)
        wanted, own = (one.model_dump(mode="json") for one in (EvaluationSection.model_validate(values), self))
        return [
            f"{key}: {own[key]} instead of {wanted[key]}" for key in wanted if key in values and own[key] != wanted[key]
        ]


class ReconstructionSection(Section):
    """`svgpipe eval-reconstruction`: reconstruction of held-out images."""

    num_images: int | None = Field(None, ge=2, description="Maximum number of held-out images; null: all.")
    batch_size: Positive = Field(32, description="Images per forward pass.")
    unit_rows: Positive = Field(500, description="Images per tar, the unit of resume.")
    extractor: ExtractorSection = ExtractorSection()
    noise: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        None,
        description="Also rebuild from latents with Gaussian noise of these deviations, in deviations of the channel; "
        "null: half of autoencoder.decoder_noise, if the decoder was trained with noise.",
    )
    vgg_weights: str = Field("hub", description="LPIPS: torchvision's VGG16 file (.pth), or hub: download it.")
    lpips_weights: str = Field("hub", description="LPIPS v0.1 vgg.pth, or hub: download it.")
    bootstrap: Resamplings = Field(100, description="Bootstrap resamplings for the intervals; 0: no intervals.")
    seed: Natural = Field(0, description="Seed of the bootstrap.")

    @model_validator(mode="after")
    def _noise_once(self) -> Self:
        if self.noise is not None and len({f"{noise:g}" for noise in self.noise}) < len(self.noise):
            raise ValueError(f"noise must name no value twice, found {list(self.noise)}")
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
