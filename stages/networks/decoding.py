"""A function that decodes latents, for whoever only wants to look at them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from svgpipe.manifests.storage import Location

from ..images.tensors import as_pixels
from ..runtime.device import pick_device
from .autoencoder import load_autoencoder


def latent_decoder(autoencoder: Location) -> Callable[[NDArray[np.float32]], NDArray[np.uint8]]:
    """Denormalised latents (n,row,column,channel) → (n,H,W,3) uint8, with the decoder at `autoencoder`.

    Raises:
        ArtifactError, MismatchError: as `load_autoencoder`, at once.
    """
    device = pick_device()
    model, _ = load_autoencoder(autoencoder)
    model.to(device)

    @torch.inference_mode()
    def decode(latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        features = torch.from_numpy(latents).permute(0, 3, 1, 2).to(device)
        return np.concatenate([as_pixels(model.decode(chunk)) for chunk in features.split(64)])

    return decode
