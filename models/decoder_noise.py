"""Noise on the decoder's input, which makes a decoder robust against the errors of generated latents.

Legend: B batch, C latent channels, h w grid.
Source: RAE (arXiv 2510.11690), noising() in rae.py, with noise_tau.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .residual import channel_moments, itself


def scaled_noise(uniform: Tensor, normal: Tensor, tau: float) -> Tensor:
    """Return noise whose deviation is one value in [0, tau] per image.

    Args:
        uniform: (B,) in [0, 1).
        normal: (B,C,h,w) standard normal.
        tau: largest deviation.

    Returns:
        (B,C,h,w), in units of each channel's deviation.
    """
    return tau * uniform.view(-1, 1, 1, 1) * normal


def with_noise(latents: Tensor, noise: Tensor, total: Callable[[Tensor], Tensor] = itself) -> Tensor:
    """Add noise to un-normalised latents (B,C,h,w): noise times the deviation of each channel over the batch.

    RAE adds it to tokens of deviation 1, after its norm. The deviation has no gradient.

    Args:
        latents: un-normalised.
        noise: (B,C,h,w), of `scaled_noise`.
        total: adds up what each of several processes has.
    """
    _, deviation = channel_moments(latents.detach(), total)
    return latents + noise * deviation.view(1, -1, 1, 1)
