"""Reads weight files of others: .safetensors, or torch files with tensors only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from svgpipe.manifests.errors import ArtifactError, first_line

# Entries of a checkpoint that may hold the weights, and what wrappers put before every name.
ENTRIES = ("state_dict", "model", "teacher", "model_ema", "state_dict_ema", "ema")
PREFIXES = ("module.", "_orig_mod.", "backbone.", "model.")


def read_weight_file(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors or torch file, by name. Nothing else is unpickled.

    A common prefix of all names is removed, such as `module.` of DataParallel or `_orig_mod.` of torch.compile.

    Raises:
        ArtifactError: the file is missing, unreadable, or does not hold one dict of tensors.
    """
    if not path.is_file():
        raise ArtifactError(f"{path}: expected a weight file, found none.")
    _require_weights(path)
    try:
        raw: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # a damaged file can raise any error in the two libraries
        # torch's own advice is to unpickle the file.
        why = (
            first_line(error)
            if "weights_only" not in str(error)
            else (
                "it is damaged, or holds Python objects other than tensors, which are not loaded because that could "
                "run code. Save the state dict alone."
            )
        )
        raise ArtifactError(f"{path}: not a readable weight file: {why}") from error
    return _without_prefixes(_state_dict(raw, path))


def _require_weights(path: Path) -> None:
    """Recognise what is often found under the name of a weight file.

    Raises:
        ArtifactError: the file is empty, a pointer of Git LFS, or a web page.
    """
    with path.open("rb") as file:
        head = file.read(64).lstrip().lower()
    if not head:
        raise ArtifactError(f"{path}: expected weights, found an empty file. Download it again.")
    if head.startswith(b"version https://git-lfs"):
        raise ArtifactError(f"{path}: expected weights, found a pointer of Git LFS. Run `git lfs pull` in its folder.")
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ArtifactError(f"{path}: expected weights, found a web page. The address may need a login.")


def _state_dict(raw: Any, path: Path) -> dict[str, Tensor]:
    """Return the only dict of tensors of a checkpoint.

    Raises:
        ArtifactError: there is none, or several.
    """
    while isinstance(raw, dict) and (inner := [key for key in ENTRIES if isinstance(raw.get(key), dict)]):
        if len(inner) > 1:
            raise ArtifactError(
                f"{path}: holds several sets of weights ({', '.join(inner)}). Save the wanted one alone."
            )
        raw = raw[inner[0]]
    if not isinstance(raw, dict) or not raw or not all(isinstance(value, Tensor) for value in raw.values()):
        found = f"a dict with {', '.join(map(str, list(raw)[:5]))}" if isinstance(raw, dict) else type(raw).__name__
        raise ArtifactError(f"{path}: expected a dict of tensors, found {found}.")
    return raw


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state):
            return _without_prefixes({name.removeprefix(prefix): value for name, value in state.items()})
    return state
