"""Recipe: settings of `svgpipe train-diffusion`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from .precision import Precision
from .schedule_section import ScheduleSection
from .section import Fraction, Natural, Positive, Section, TimeShift

Objective = Literal["flow", "ddpm"]


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
