"""Reading official checkpoints safely: tensors are taken, and nothing in the file is ever run.

Lightning puts more than tensors into its files. Classes that are known to be harmless there are read as empty shells;
a file that needs any other is refused with its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svgpipe.manifests.errors import ArtifactError, first_line

# What Lightning, argparse, OmegaConf and numpy leave in a checkpoint beside its tensors.
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


class _Shell:
    """Stands for an object that nobody needs: takes whatever the file says of it, and keeps nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        del state


class _MappingShell:
    """Stands for a kind of dict: torch fills no others than plain ones."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return {}


def read_official(path: Path) -> Any:
    """What `torch.save` wrote, tensors on the CPU.

    Raises:
        ArtifactError: missing, not a file of torch's, or one that would have to run code to be read.
    """
    if not path.is_file():
        raise ArtifactError(f"{path}: expected a checkpoint file, found none.")
    try:
        needed = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        foreign = sorted({*needed} - {*OBJECTS, *MAPPINGS})
        if foreign:
            raise ArtifactError(
                f"{path}: holds {', '.join(foreign)}, which is no tensor and not known to be harmless; to read it "
                "could run code. Where you trust the file, save its state dict alone: "
                "torch.save(ckpt['state_dict'], FILE)."
            )
        shells = [(_MappingShell if name in MAPPINGS else _Shell, name) for name in needed]
        with torch.serialization.safe_globals(shells):  # type: ignore[arg-type]
            return torch.load(path, map_location="cpu", weights_only=True)
    except ArtifactError:
        raise
    except Exception as error:  # torch raises whatever a damaged file provokes
        raise ArtifactError(f"{path}: not a readable checkpoint: {first_line(error)}") from error


def tensors_of(path: Path, checkpoint: Any, *names: str) -> dict[str, Tensor]:
    """The state dict in what was read: under the first of `names` that is there, or the whole; floats in float32.

    `module.`, which DistributedDataParallel puts before every key, is dropped.
    Raises ArtifactError if it is no dict of dense tensors.
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
    wrapped = all(str(key).startswith("module.") for key in state)
    return {
        str(key).removeprefix("module.") if wrapped else str(key): v.float() if v.is_floating_point() else v
        for key, v in state.items()
    }
