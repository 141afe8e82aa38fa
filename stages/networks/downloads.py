"""Weight files from the network, checked against known hashes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from svgpipe.manifests.filesystem import file_sha256


@dataclass(frozen=True)
class Download:
    """A file of tensors at a URL, with the first digits (eight or more) of its sha256 in hex."""

    url: str
    sha256: str

    def is_file(self, path: Path) -> bool:
        """Return whether a local file is this one."""
        return file_sha256(path).startswith(self.sha256)

    def load(self) -> dict[str, Tensor]:
        """Return the tensors, from torch's cache folder if the file was downloaded before.

        Raises:
            RuntimeError: the file has another hash. Without a network, urllib raises its own errors.
        """
        # torch checks the digits between the last hyphen and the dot of the file name.
        name = f"{self.url.rpartition('/')[2].partition('.')[0].partition('-')[0]}-{self.sha256}.pth"
        state: dict[str, Tensor] = torch.hub.load_state_dict_from_url(
            self.url, map_location="cpu", weights_only=True, check_hash=True, file_name=name
        )
        return state
