"""Recipe: settings of `svgpipe train-autoencoder`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from .precision import Precision
from .schedule_section import ScheduleSection
from .section import Fraction, Natural, Positive, Section

AutoencoderKind = Literal["svg", "vision", "kl", "aligned-kl"]


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
