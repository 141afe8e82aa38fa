"""Weight files from the network, checked against the hash that they had when this was written."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Download:
    """A file of tensors at an address, and the first digits, eight or more, of its sha256 in hex."""

    url: str
    sha256: str

    def load(self) -> dict[str, Tensor]:
        """Its tensors, from torch's own cache folder if it was fetched before.

        Raises:
            RuntimeError: the file has another hash. Whatever urllib raises without a network.
        """
        # torch checks the digits that stand between a hyphen and the dot of the name, so the name is given them.
        name = f"{self.url.rpartition('/')[2].partition('.')[0].partition('-')[0]}-{self.sha256}.pth"
        state: dict[str, Tensor] = torch.hub.load_state_dict_from_url(
            self.url, map_location="cpu", weights_only=True, check_hash=True, file_name=name
        )
        return state
