"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from svgpipe.manifests.errors import UsageError
from svgpipe.manifests.filesystem import Location, location, make_directory

if TYPE_CHECKING:
    from svgpipe.stages.runtime.resources import Resources


RecipeOption = Annotated[
    str | None, typer.Option("--recipe", help="Built-in recipe or a .yaml file; without it, defaults.")
]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")]
OutOption = Annotated[str, typer.Option("--out", help="Directory to create or resume.")]
ShardsOption = Annotated[
    str, typer.Option("--shards", help="Shard set, or tars of one: 'path/shard-{000000..000009}.tar'.")
]
AutoencoderOption = Annotated[str, typer.Option("--autoencoder", help="Finished autoencoder.")]
WorkersOption = Annotated[
    int | None,
    typer.Option("--num-workers", min=1, help="Workers that compute; default: one for each GPU, or one. More use Ray."),
]
TrainersOption = Annotated[
    int | None,
    typer.Option("--num-workers", min=1, help="Training workers on Ray; without it, this process, without Ray."),
]
WandbOption = Annotated[
    str | None, typer.Option("--wandb", help="Project of Weights & Biases to log to as well; needs the extra wandb.")
]
CpusOption = Annotated[
    float | None,
    typer.Option("--cpus-per-worker", min=0.1, help="CPUs for each worker; default 1 or its share."),
]
GpusOption = Annotated[
    float | None, typer.Option("--gpus-per-worker", min=0, help="GPUs for each worker; default 1 if there is any.")
]
MaxRejectsOption = Annotated[
    float, typer.Option("--max-rejects", min=0, max=1, help="Share of images that may be unusable before it stops.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
HtmlOption = Annotated[str | None, typer.Option("--html", help="Also write a page to look at.")]
AddressOption = Annotated[
    str | None, typer.Option("--address", help="Ray cluster to run on, as `auto`; without it, this machine.")
]


def read_class_names(path: Path | None) -> list[str] | None:
    """Lines of a file of class names, in the order of the labels; None without a file.

    Raises:
        UsageError: no such file, no text, nothing in it, an empty line, or a name that stands there twice.
    """
    if path is None:
        return None
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: expected a file with one class name per line, in UTF-8, found none.") from error
    if not names:
        raise UsageError(f"{path}: expected one class name per line, found an empty file.")
    first: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if not name.strip():
            raise UsageError(f"{path}: expected a class name in every line, found none in line {number}.")
        if name in first:
            raise UsageError(
                f"{path}: lines {first[name]} and {number} are both {name!r}; expected names that differ, "
                "as a label may be given by its name. (Lists of ImageNet's classes have two cranes and two maillots.)"
            )
        first[name] = number
    return names


def trainers_of(num_workers: int | None, **others: object) -> Resources | None:
    """Training workers; None trains in this process.

    Raises:
        UsageError: one of the `others`, which only workers know, was given without them.
    """
    if num_workers is None:
        for name, value in others.items():
            if value is not None:
                option = f"--{name.replace('_', '-')}"
                raise UsageError(f"{option}: training runs in this process unless --num-workers says how many workers.")
        return None
    cpus, gpus = others.get("cpus_per_worker"), others.get("gpus_per_worker")
    assert isinstance(cpus, float | None) and isinstance(gpus, float | None)
    return resources_of(num_workers, cpus, gpus)


def resources_of(num_workers: int | None, cpus: float | None, gpus: float | None) -> Resources:
    """What the options ask for; None is decided by what the cluster has."""
    from svgpipe.stages.runtime.resources import Resources

    return Resources(num_workers, cpus, gpus)


def page_at(html: str | None) -> Location | None:
    """Where a page is to be written, its folder made: hours of measuring must not end in a folder that is missing.

    Raises:
        UsageError: a directory, or below something that is none. OSError: the folder cannot be made.
    """
    if html is None:
        return None
    page = location(html)
    if page.is_dir():
        raise UsageError(f"--html {html}: expected a file to write, found a directory.")
    try:
        make_directory(page.parent)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"--html {html}: {error.filename} is no folder.") from error
    return page
