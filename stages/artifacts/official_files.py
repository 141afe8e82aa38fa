"""Reads official checkpoints safely, with `weights_only=True`.

Lightning stores more than tensors. Classes that are known to be harmless are read as empty objects. Files that need
other classes are rejected by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from svgpipe.manifests.errors import ArtifactError, first_line

# Classes that Lightning, argparse, OmegaConf and numpy leave in a checkpoint.
OBJECTS = (
    "argparse.Namespace",
    "builtins.dict",
    "builtins.int",
    "builtins.list",
    "builtins.set",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.nodes.AnyNode",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "typing.Any",
)
MAPPINGS = (
    "collections.defaultdict",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)


WRAPPERS = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before every name


class _Shell:
    """Replaces an object of a known class: accepts any state and keeps nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        del state


class _MappingShell:
    """Replaces a dict subclass, because torch fills only plain dicts."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return {}


def read_official(path: Path) -> Any:
    """Return the content of a .safetensors file, or of one of `torch.save`, tensors on the CPU.

    Raises:
        ArtifactError: the file is missing, not a torch file, or would have to run code.
    """
    if not path.is_file():
        raise ArtifactError(f"{path}: expected a checkpoint file, found none.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        needed = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        foreign = sorted({*needed} - {*OBJECTS, *MAPPINGS})
        if foreign:
            raise ArtifactError(
                f"{path}: holds {', '.join(foreign)}, which are no tensors and not known to be harmless; reading them "
                "could run code. If you trust the file, save only its state dict: "
                "torch.save(ckpt['state_dict'], FILE)."
            )
        shells = [(_MappingShell if name in MAPPINGS else _Shell, name) for name in needed]
        with torch.serialization.safe_globals(shells):  # type: ignore[arg-type]
            return torch.load(path, map_location="cpu", weights_only=True)
    except ArtifactError:
        raise
    except Exception as error:  # a damaged file can raise any error in torch
        raise ArtifactError(f"{path}: not a readable checkpoint: {first_line(error)}") from error


def tensors_of(path: Path, checkpoint: Any, *names: str) -> dict[str, Tensor]:
    """Return the state dict at the first existing key of `names`, or the whole checkpoint; floats in float32.

    The prefixes of DistributedDataParallel and torch.compile are removed.

    Raises:
        ArtifactError: it is not a dict of dense tensors.
    """
    held = checkpoint if isinstance(checkpoint, Mapping) else {}
    state = next((held[name] for name in names if isinstance(held.get(name), Mapping)), checkpoint)
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        kind = (
            f"a dict of {', '.join(map(str, list(state)[:6]))}" if isinstance(state, Mapping) else type(state).__name__
        )
        raise ArtifactError(f"{path}: expected a state dict of tensors, found {kind}.")
    for key, value in state.items():
        if value.layout != torch.strided or value.is_meta or value.is_quantized or value.is_complex():
            kind = "no data" if value.is_meta else f"{value.layout} of {value.dtype}"
            raise ArtifactError(f"{path}: {key}: expected a dense tensor of real numbers, found {kind}.")
    named = {str(key): value.float() if value.is_floating_point() else value for key, value in state.items()}
    for wrapper in WRAPPERS:
        if all(key.startswith(wrapper) for key in named):
            named = {key.removeprefix(wrapper): value for key, value in named.items()}
    return named
