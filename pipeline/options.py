"""Options that several commands share, and what they are turned into."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from svgpipe.manifests.errors import UsageError
from svgpipe.manifests.filesystem import Location, location, make_directory
from svgpipe.manifests.local_copy import LocalDisk
from svgpipe.manifests.presets import NAMES as PRESETS
from svgpipe.manifests.protocols import NAMES as PROTOCOLS
from svgpipe.manifests.store_spec import StoreDtype

from .synsets import imagenet_synsets

if TYPE_CHECKING:
    from svgpipe.stages.runtime.resources import Resources

# Panels of `svgpipe --help`.
IMAGENET = "imagenet"
DEFAULT_LOCAL_GB, MAX_LOCAL_GB = 100.0, 1e9
RUN, STAGES, LOOK, MEND, ANALYSE = "All stages", "Stages", "Look at artifacts", "Mend and convert", "Analyse"

RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME|FILE",
        help="Built-in recipe or .yaml file. Without it, every setting has its default.",
    ),
]
RequiredRecipeOption = Annotated[
    str, typer.Option("--recipe", metavar="NAME|FILE", help="Built-in recipe or .yaml file.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one value. Repeatable.")
]
OutOption = Annotated[str, typer.Option("--out", metavar="DIR", help="Directory to create or resume.")]
WorkdirOption = Annotated[
    str,
    typer.Option("--workdir", metavar="DIR", help="Directory of all outputs. Run the same command again to resume."),
]
ProcessesOption = Annotated[
    int | None, typer.Option("--workers", metavar="N", min=1, help="Processes. Default: one per core.")
]
HoldoutOption = Annotated[
    float | None,
    typer.Option(
        "--holdout", metavar="FRACTION", min=0, max=0.99, help="Fraction of every class kept out of training."
    ),
]
SOURCE_HELP = "class folders, a tar or zip of them, or parquet/arrow tables"
HeldoutOption = Annotated[
    str | None, typer.Option("--heldout", metavar="SOURCE", help=f"Images kept out of training: {SOURCE_HELP}.")
]
HeldoutLabelsOption = Annotated[
    str | None,
    typer.Option("--heldout-labels", metavar="FILE", help="Labels of --heldout images that lie in no class folders."),
]
UnlabelledOption = Annotated[bool, typer.Option("--unlabelled", help="Ignore labels: all images are one class.")]
KeepDamagedOption = Annotated[
    bool, typer.Option("--keep-damaged", help="Keep damaged JPEGs. Parts of them may be grey.")
]
ShardsOption = Annotated[
    str,
    typer.Option("--shards", metavar="DIR", help="Shard set, or tars of it: 'DIR/shard-{000000..000009}.tar'."),
]
AutoencoderOption = Annotated[str, typer.Option("--autoencoder", metavar="DIR", help="Finished autoencoder.")]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--workers", metavar="N", min=1, help="Workers. Default: one per GPU, or one. More than one runs on Ray."
    ),
]
TRAIN_WORKERS_HELP = "Training workers on Ray. Default: train in this process, without Ray."
TrainersOption = Annotated[int | None, typer.Option("--workers", metavar="N", min=1, help=TRAIN_WORKERS_HELP)]
TrainWorkersOption = Annotated[int | None, typer.Option("--train-workers", metavar="N", min=1, help=TRAIN_WORKERS_HELP)]
CpusOption = Annotated[
    float | None,
    typer.Option(
        "--cpus-per-worker", metavar="N", min=0.1, help="CPUs per worker. Default: 1, or an even share of the cores."
    ),
]
GpusOption = Annotated[
    float | None,
    typer.Option("--gpus-per-worker", metavar="N", min=0, help="GPUs per worker. Default: 1 if there are GPUs."),
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address", metavar="ADDRESS", help="Ray cluster to run on, for example `auto`. Default: this machine."
    ),
]
StrategyOption = Annotated[
    Literal["ddp", "fsdp2"] | None,
    typer.Option("--strategy", help="ddp (default): every worker holds the model. fsdp2: the model is sharded."),
]
WandbOption = Annotated[
    str | None, typer.Option("--wandb", metavar="PROJECT", help="Also log to Weights & Biases (extra: wandb).")
]
LocalCacheOption = Annotated[
    str | None,
    typer.Option("--local-cache", metavar="DIR", help="Local disk that keeps files of the cache during training."),
]
LocalGbOption = Annotated[
    float | None, typer.Option("--local-gb", metavar="N", help="Gigabytes for --local-cache. Default: 100.")
]
StoreDtypeOption = Annotated[
    StoreDtype | None, typer.Option("--store-dtype", help="int8 takes less than half the space of float16.")
]
MaxRejectsOption = Annotated[
    float,
    typer.Option(
        "--max-rejects",
        metavar="FRACTION",
        min=0,
        max=1,
        help="Stop when more than this fraction of images is unusable.",
    ),
]
PresetOption = Annotated[
    str | None,
    typer.Option("--preset", metavar="NAME", help=f"Settings of a published number: {', '.join(PRESETS)}."),
]
ProtocolOption = Annotated[
    str | None,
    typer.Option("--protocol", metavar="NAME", help=f"Measure as published numbers were: {', '.join(PROTOCOLS)}."),
]
StepsOption = Annotated[
    str | None, typer.Option("--steps", metavar="N,N,…", help="Sampling steps, for example 5,10,25.")
]
GuidanceOption = Annotated[
    str | None, typer.Option("--guidance", metavar="W,W,…", help="Guidance scales, for example 1.0,1.5.")
]
EmaOption = Annotated[
    str | None,
    typer.Option(
        "--ema",
        metavar="DECAY|ema|power-SIGMA|raw",
        help="Weights: an EMA decay (0.9999), ema (the recipe's first), power-SIGMA (see svgpipe ema) or raw.",
    ),
]
GuideOption = Annotated[
    str | None,
    typer.Option("--guide", metavar="DIR", help="Autoguidance by a worse model, or checkpoint, of the same cache."),
]
ReferenceOption = Annotated[
    str,
    typer.Option(
        "--reference",
        metavar="PATH",
        help="Real images: a shard set, an image folder, or an .npz as ADM publishes them.",
    ),
]
PoolOption = Annotated[
    str | None,
    typer.Option(
        "--pool", metavar="DIR", help="Directory of latents and features that runs share. Default: next to the output."
    ),
]
NpzOption = Annotated[bool, typer.Option("--npz", help="Also write the samples as .npz for the ADM evaluator.")]
PngOption = Annotated[bool, typer.Option("--png", help="Also write the samples as .png files.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
HtmlOption = Annotated[str | None, typer.Option("--html", metavar="FILE", help="Also write an HTML page.")]


def overrides_with(
    overrides: list[str] | None,
    *,
    source: str | None = None,
    heldout: str | None = None,
    heldout_labels: str | None = None,
    unlabelled: bool = False,
    holdout: float | None = None,
    keep_damaged: bool = False,
    store_dtype: str | None = None,
    preset: str | None = None,
    protocol: str | None = None,
    steps: str | None = None,
    guidance: str | None = None,
    ema: str | None = None,
) -> list[str]:
    """Return the values of --set, followed by those of options that stand for a key of the recipe."""
    values = {
        "source": _quoted(source),
        "heldout": _quoted(heldout),
        "heldout_labels": _quoted(heldout_labels),
        "unlabelled": unlabelled or None,
        "shard.holdout": holdout,
        "shard.keep_damaged": keep_damaged or None,
        "extract.store_dtype": store_dtype,
        "evaluation.preset": preset,
        "evaluation.protocol": protocol,
        "evaluation.steps": None if steps is None else f"[{steps}]",
        "evaluation.guidance": None if guidance is None else f"[{guidance}]",
        "evaluation.weights": None if ema is None else f'"{ema}"',
    }
    return [*(overrides or []), *(f"{key}={value}" for key, value in values.items() if value is not None)]


def positive_numbers(text: str, option: str) -> list[float]:
    """Return the different numbers of an option like `0.05,0.10`, in their order.

    Raises:
        UsageError: something else than positive numbers.
    """
    try:
        numbers = list(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number < math.inf for number in numbers):
        raise UsageError(f"{option}: expected numbers above 0, such as 0.05,0.10, found {text!r}.")
    return numbers


def _quoted(text: str | None) -> str | None:
    return None if text is None else json.dumps(text)


def local_disk(folder: str | None, gigabytes: float | None) -> LocalDisk | None:
    """Return where files of the cache are kept; None: nowhere.

    Raises:
        UsageError: no local folder, a size without a folder, or a size that is not positive.
    """
    if folder is None:
        if gigabytes is not None:
            raise UsageError("--local-gb: expected --local-cache DIR with it, found none.")
        return None
    place, size = location(folder), DEFAULT_LOCAL_GB if gigabytes is None else gigabytes
    if not isinstance(place, Path):
        raise UsageError(f"--local-cache {folder}: expected a folder on a local disk, found an object store.")
    if not 0 < size < MAX_LOCAL_GB:
        raise UsageError(f"--local-gb {size:g}: expected a number of gigabytes above 0 and below {MAX_LOCAL_GB:g}.")
    return LocalDisk(place.absolute(), int(size * 1e9))


def read_class_names(path: Path | None) -> list[str] | None:
    """Return the class names in a file, in label order; `imagenet`: the 1,000 synsets of ImageNet; None: None.

    Raises:
        UsageError: no such file, not UTF-8, empty, an empty line, or a duplicate name.
    """
    if path is None:
        return None
    if str(path) == IMAGENET and not path.exists() and (synsets := imagenet_synsets()):
        return synsets
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: expected a file with one class name per line, in UTF-8, found none.") from error
    # Not splitlines, which also splits at characters that names may hold.
    names = [line.strip() for line in re.split(r"\r\n|\n|\r", text)]
    names = names if names[-1] else names[:-1]
    if not names:
        raise UsageError(f"{path}: expected one class name per line, found an empty file.")
    first: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if not name:
            raise UsageError(f"{path}: expected a class name in every line, found none in line {number}.")
        if name in first:
            raise UsageError(
                f"{path}: lines {first[name]} and {number} are both {name!r}; expected unique names, because a label "
                "may be given by its name. (Lists of ImageNet classes have two cranes and two maillots.)"
            )
        first[name] = number
    return names


def trainers_of(num_workers: int | None, **others: object) -> Resources | None:
    """Return the training workers; None: train in this process.

    Raises:
        UsageError: an option for workers (`others`) was given without --workers.
    """
    if num_workers is None:
        for name, value in others.items():
            if value is not None:
                option = f"--{name.replace('_', '-')}"
                raise UsageError(f"{option}: needs --workers N. Without it, training runs in this process.")
        return None
    cpus, gpus = others.get("cpus_per_worker"), others.get("gpus_per_worker")
    assert isinstance(cpus, float | None) and isinstance(gpus, float | None)
    return resources_of(num_workers, cpus, gpus)


def resources_of(num_workers: int | None, cpus: float | None, gpus: float | None) -> Resources:
    """Return the resources that the options ask for; None: decided by the cluster."""
    from svgpipe.stages.runtime.resources import Resources

    return Resources(num_workers, cpus, gpus)


def page_at(html: str | None) -> Location | None:
    """Return the location of a page, and create its folder, so that hours of measuring do not end with an error.

    Raises:
        UsageError: the path is a directory, or its parent is a file.
        OSError: the folder cannot be created.
    """
    if html is None:
        return None
    page = location(html)
    if page.is_dir():
        raise UsageError(f"--html {html}: expected a file to write, found a directory.")
    try:
        make_directory(page.parent)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"--html {html}: {error.filename} is not a folder.") from error
    return page
