"""The exact velocity field of a finite data set, which the flow-matching loss is minimised by.

Legend: B points, N data rows, D dimensions; z_t = (1-t) z0 + t x1, as in flow.py.
"""

from __future__ import annotations

import torch
from torch import Tensor


def empirical_velocity(z_BD: Tensor, t: float, data_ND: Tensor, likely_BN: Tensor | None = None) -> Tensor:
    """(B,D) E[x1 - z0 | z_t = z] where x1 is one of the data rows, each as likely, and z0 standard normal.

    (E[x1 | z] - z) / (1-t), the expectation being over the rows by `posterior`, which may be given where it is known.
    This is the minimiser of the flow-matching loss on these rows (arXiv 2209.03003, section 2).

    Raises:
        ValueError: unless 0 <= t < 1.
    """
    likely_BN = posterior(z_BD, t, data_ND) if likely_BN is None else likely_BN
    return (likely_BN.to(data_ND.dtype) @ data_ND - z_BD) / (1 - t)


def posterior(z_BD: Tensor, t: float, data_ND: Tensor) -> Tensor:
    """(B,N) float64, how likely each data row is x1: a softmax, as z is normal about t x1 with deviation 1-t.

    Raises:
        ValueError: unless 0 <= t < 1.
    """
    if not 0 <= t < 1:
        raise ValueError(f"time: expected 0 <= t < 1, found {t}")
    # float64: of a latent of 100,000 numbers the rows' distances are large, and what counts is their difference.
    distance = torch.cdist(z_BD.double(), t * data_ND.double()).square()
    return (-distance / (2 * (1 - t) ** 2)).softmax(dim=1)
