"""DDPM with learned variance, as DiT trains and samples: noise schedule, loss, DDPM and DDIM steps.

Time is the number of a noising step here, from 0 (almost data) to 999 (almost noise), and the model sees this number.
Legend: B batch, T cells, C channels; x data, x_t noised latents, eps noise; abar the cumulative product of 1 - beta.
Source: official DiT diffusion/gaussian_diffusion.py, respace.py, diffusion_utils.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from .guidance import Guidance, GuidedVelocity
from .sampler import Noise, Watch

STEPS = 1000
FIRST_BETA, LAST_BETA = 1e-4, 0.02
PIXEL = 1 / 255  # half the width of a bin of 8-bit images in [-1,1]; official DiT applies it to latents too
TAIL = 0.999
Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(B,T,C) noised latents, (B,) step numbers, (B,) labels → (B,T,2C): noise, then fraction of the log variance."""


@dataclass(frozen=True)
class Process:
    """A noising process of n steps, its tables in float64 (n,).

    Attributes:
        numbers: of the steps among the 1,000 of the training; the model sees them.
        betas: variance that each step adds.
    """

    numbers: Sequence[int]
    betas: Tensor

    @classmethod
    @cache
    def of_training(cls) -> Process:
        """Return the 1,000 steps of the training: linear betas. Every call returns the same object with its tables."""
        return cls(range(STEPS), torch.linspace(FIRST_BETA, LAST_BETA, STEPS, dtype=torch.float64))

    def respaced(self, numbers: Sequence[int]) -> Process:
        """Return the process that visits only these steps, ascending."""
        kept = self.abar[list(numbers)]
        before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
        return Process(numbers, 1 - kept / before)

    @cached_property
    def abar(self) -> Tensor:
        """Cumulative product of 1 - beta."""
        return torch.cumprod(1 - self.betas, dim=0)

    @cached_property
    def abar_before(self) -> Tensor:
        """The same one step nearer to the data; 1 at the first step."""
        return torch.cat([torch.ones(1, dtype=torch.float64), self.abar[:-1]])

    @cached_property
    def posterior_variance(self) -> Tensor:
        """Variance of x_(t-1) given x_t and x."""
        return self.betas * (1 - self.abar_before) / (1 - self.abar)

    @cached_property
    def posterior_log_variance(self) -> Tensor:
        """Its logarithm. The first entry, which would be infinite, is that of the second step."""
        variance = self.posterior_variance
        return torch.cat([variance[1:2] if len(variance) > 1 else self.betas[:1], variance[1:]]).log()

    @cached_property
    def data_weight(self) -> Tensor:
        """Weight of x in the mean of x_(t-1)."""
        return self.betas * self.abar_before.sqrt() / (1 - self.abar)

    @cached_property
    def noised_weight(self) -> Tensor:
        """Weight of x_t in the mean of x_(t-1)."""
        return (1 - self.abar_before) * (1 - self.betas).sqrt() / (1 - self.abar)

    def data(self, x_t: Tensor, eps: Tensor, step: Tensor) -> Tensor:
        """Return the data that x_t and a prediction of its noise imply."""
        inverse = at(1 / self.abar, step, x_t)
        return inverse.sqrt() * x_t - (inverse - 1).sqrt() * eps

    def mean(self, data: Tensor, x_t: Tensor, step: Tensor) -> Tensor:
        """Return the mean of x_(t-1) given x_t and the data."""
        return at(self.data_weight, step, x_t) * data + at(self.noised_weight, step, x_t) * x_t

    def log_variance(self, fraction: Tensor, step: Tensor) -> Tensor:
        """Return the learned log variance: between that of the posterior (-1) and beta (1); not clamped."""
        share = (fraction + 1) / 2
        return share * at(self.betas.log(), step, fraction) + (1 - share) * at(
            self.posterior_log_variance, step, fraction
        )


def at(table: Tensor, step: Tensor, like: Tensor) -> Tensor:
    """Return entries (B,1,1) of a float64 table, rounded to float32, as the official code does."""
    return table.to(like.device)[step].float()[:, None, None]


def equal_steps(counts: Sequence[int]) -> list[int]:
    """Return step numbers: in every one of len(counts) equal sections, so many evenly spread ones, both ends included.

    Raises:
        ValueError: a section has fewer steps than it should give.
    """
    size, extra = divmod(STEPS, len(counts))
    numbers, start = [], 0
    for section, count in enumerate(counts):
        length = size + (section < extra)
        if not 1 <= count <= length:
            raise ValueError(f"sampling steps: expected 1 to {length}, found {count}")
        stride, position = (length - 1) / (count - 1) if count > 1 else 1.0, 0.0
        for _ in range(count):
            numbers.append(start + round(position))
            position += stride
        start += length
    return numbers


def ddim_steps(count: int) -> list[int]:
    """Return `count` step numbers with one whole distance, beginning with 0.

    Raises:
        ValueError: no whole distance gives as many.
    """
    for distance in range(1, STEPS):
        if len(range(0, STEPS, distance)) == count:
            return list(range(0, STEPS, distance))
    near = sorted({len(range(0, STEPS, distance)) for distance in range(1, STEPS)}, key=lambda n: abs(n - count))[:2]
    raise ValueError(f"sampling steps: no whole distance gives {count} steps of DDIM; expected for example {near}")


def noised(x: Tensor, eps: Tensor, step: Tensor, process: Process) -> Tensor:
    """Return x_t = sqrt(abar) x + sqrt(1 - abar) eps, (B,T,C)."""
    return at(process.abar.sqrt(), step, x) * x + at((1 - process.abar).sqrt(), step, x) * eps


@dataclass(frozen=True)
class DDPMLoss:
    """Loss of a batch, (B,) each.

    Attributes:
        squared_error: of the noise, mean over cells and channels.
        bound: variational term in bits per value. It trains the variance alone.
    """

    squared_error: Tensor
    bound: Tensor


def ddpm_loss(model: Denoiser, x: Tensor, eps: Tensor, step: Tensor, labels: Tensor, process: Process) -> DDPMLoss:
    """Return the loss at the steps `step` (B,) int64 of `process`, which is the one of the training.

    Args:
        model: predicts noise and variance.
        x: (B,T,C) data.
        eps: (B,T,C) standard normal noise.
        step: (B,) int64 step numbers.
        labels: (B,) after label dropout.
        process: of the training.
    """
    x_t = noised(x, eps, step, process)
    predicted, fraction = model(x_t, step.float(), labels).float().chunk(2, dim=-1)
    squared_error = (eps - predicted).square().flatten(1).mean(dim=1)
    mean = process.mean(process.data(x_t, predicted.detach(), step), x_t, step)
    log_variance = process.log_variance(fraction, step)
    true_mean, true_log = process.mean(x, x_t, step), at(process.posterior_log_variance, step, x)
    divergence = 0.5 * (
        log_variance
        - true_log
        - 1
        + (true_log - log_variance).exp()
        + (true_mean - mean).square() * (-log_variance).exp()
    )
    likelihood = -_log_likelihood(x, mean, 0.5 * log_variance)
    terms = torch.where((step == 0)[:, None, None], likelihood, divergence)
    return DDPMLoss(squared_error, terms.flatten(1).mean(dim=1) / math.log(2.0))


def _log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Return the log probability of the bins of 8-bit images around x under a normal distribution."""
    centred, scale = x - mean, (-log_std).exp()
    above, below = _normal_cdf(scale * (centred + PIXEL)), _normal_cdf(scale * (centred - PIXEL))
    inside = (above - below).clamp_min(1e-12).log()
    upper = torch.where(x > TAIL, (1 - below).clamp_min(1e-12).log(), inside)
    return torch.where(x < -TAIL, above.clamp_min(1e-12).log(), upper)


def _normal_cdf(x: Tensor) -> Tensor:
    """Approximate the standard normal distribution function by a tanh, as the official code."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@torch.no_grad()
def sample_ddpm(
    model: Denoiser,
    x_T: Tensor,
    labels: Tensor,
    *,
    null_label: int,
    numbers: Sequence[int],
    guidance: Guidance | None = None,
    weak: Denoiser | None = None,
    noise: Noise,
    ddim_eta: float | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Denoise step by step: (B,T,C) → (B,T,C).

    Args:
        model: predicts noise and variance.
        x_T: standard normal noise.
        labels: (B,).
        null_label: the label for 'no class'.
        numbers: steps of the training that are visited, ascending, see `equal_steps` and `ddim_steps`.
        guidance: of the predicted noise; the variance is that of the labels. Its times run from 0 (noise) to 1 (data).
        weak: a worse model, for autoguidance.
        noise: of the steps; the last step has none.
        ddim_eta: DDIM with this share of noise, instead of DDPM.
        watch: receives every state.
    """
    watch = watch or (lambda state: None)
    watch(x_T)
    process, guidance, x = Process.of_training().respaced(numbers), guidance or Guidance(), x_T
    channels = guidance.channels or x_T.shape[-1]
    predict = GuidedVelocity(model, null_label, weak, channels)
    steps = len(numbers)
    for place, index in enumerate(reversed(range(steps))):
        number = numbers[index]
        weights = guidance.weights(place, steps, 1 - number / (STEPS - 1))
        eps, fraction = predict(x, float(number), labels, weights).to(x.dtype).chunk(2, dim=-1)
        step = torch.full((len(x),), index, device=x.device)
        data = process.data(x, eps, step)
        drawn = torch.zeros_like(x) if index == 0 or ddim_eta == 0 else noise(place)
        if ddim_eta is None:
            deviation = (0.5 * process.log_variance(fraction, step)).exp()
            x = process.mean(data, x, step) + deviation * drawn
        else:
            x = _ddim_step(process, data, eps, step, ddim_eta, drawn)
        watch(x)
    return x


def _ddim_step(process: Process, data: Tensor, eps: Tensor, step: Tensor, eta: float, drawn: Tensor) -> Tensor:
    """Return x_(t-1) of DDIM (arXiv 2010.02502, eq. 12)."""
    abar, before = at(process.abar, step, data), at(process.abar_before, step, data)
    deviation = eta * ((1 - before) / (1 - abar)).sqrt() * (1 - abar / before).sqrt()
    return before.sqrt() * data + (1 - before - deviation.square()).sqrt() * eps + deviation * drawn
