"""Commands that show images of a finished diffusion model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from svgpipe.manifests.errors import UsageError
from svgpipe.manifests.filesystem import location

from .console import ConsoleProgress
from .options import LOOK, EmaOption, SetOption
from .synsets import shown_names

if TYPE_CHECKING:
    from svgpipe.stages.sample import ImageSampler

app = typer.Typer()
COUNT = 16


PicturesOption = Annotated[
    str,
    typer.Option(
        "--out", metavar="FILE|DIR", help="NAME.png: one sheet. NAME.npz: all images. Folder: single .png files."
    ),
]
ClassesOption = Annotated[
    str | None, typer.Option("--classes", metavar="C,C,…", help="Names or numbers of classes. Default: all.")
]
CountOption = Annotated[
    int | None, typer.Option("--count", metavar="N", min=1, help="Images, shared by the classes. Default: 16.")
]
OneStepsOption = Annotated[
    int | None, typer.Option("--steps", metavar="N", min=1, help="Sampling steps. Default: diffusion.sample_steps.")
]
ScaleOption = Annotated[float, typer.Option("--guidance", metavar="W", min=0, help="Guidance scale; 1: none.")]
SeedOption = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of the noise.")]
ShowStepsOption = Annotated[
    bool, typer.Option("--show-steps", help="Also NAME.steps.png and .webp: every step of the sampling, decoded.")
]
InterpolateOption = Annotated[
    tuple[str, str] | None,
    typer.Option(
        "--interpolate", metavar="A B", help="Between two classes; with --classes, between two seeds. Also NAME.webp."
    ),
]
FramesOption = Annotated[int, typer.Option("--frames", metavar="N", min=2, max=256, help="Images of an interpolation.")]
DecoderOption = Annotated[
    str | None,
    typer.Option("--autoencoder", metavar="DIR", help="Decodes. Default: the autoencoder of the model's cache."),
]

EncoderOption = Annotated[
    str | None,
    typer.Option("--autoencoder", metavar="DIR", help="Encodes and decodes. Default: that of the model's cache."),
]


@app.command(rich_help_panel=LOOK)
def sample(
    model: Annotated[str, typer.Argument(help="Finished diffusion model, or a checkpoint.")],
    out: PicturesOption,
    classes: ClassesOption = None,
    count: CountOption = None,
    steps: OneStepsOption = None,
    guidance: ScaleOption = 1.0,
    seed: SeedOption = 0,
    show_steps: ShowStepsOption = False,
    interpolate: InterpolateOption = None,
    frames: FramesOption = 16,
    autoencoder: DecoderOption = None,
    ema: EmaOption = None,
    overrides: SetOption = None,
) -> None:
    """Sample images of some classes: a sheet, single files or an .npz.

    --set evaluation.KEY=VALUE changes other settings of the sampling, for example solver or time_shift.
    """
    from svgpipe.stages.sample import load
    from svgpipe.stages.sample.classes import labels_in_order
    from svgpipe.stages.sample.pictures import form_of, require_new, write_images
    from svgpipe.stages.sample.sheets import write_interpolation, write_steps

    place, written = location(out), []
    if show_steps:
        written = [place.with_suffix(".steps.png"), place.with_suffix(".steps.webp")]
    elif interpolate is not None:
        written = [place.with_suffix(".webp")]
    _require_fitting(form_of(place), show_steps=show_steps, interpolate=interpolate, count=count)
    require_new(place, *written)
    sampler = load(model, autoencoder, ema or "ema")
    settings = sampler.settings(*(overrides or ()), steps=steps, guidance=guidance, seed=seed)
    names = shown_names(sampler.class_names)
    numbers = [] if classes is None else list(dict.fromkeys(_class_numbers(sampler, classes.split(","), names)))
    if interpolate is not None:
        ends = _seeds(interpolate) if numbers else _class_numbers(sampler, interpolate, names)
        with ConsoleProgress() as progress:
            write_interpolation(place, sampler, ends, numbers, settings, names, frames, progress)
        typer.echo(f"{out}, {written[0]}: {frames} images from {interpolate[0]} to {interpolate[1]}")
        return
    labels = labels_in_order(numbers or sampler.trained.classes or range(len(names)), _count(count, numbers))
    if show_steps:
        with ConsoleProgress() as progress:
            images = write_steps(place, sampler, labels, settings, names, progress)
        typer.echo(f"{written[0]}, {written[1]}: {settings.steps} steps")
    else:
        with ConsoleProgress() as progress:
            images = sampler.images(labels, settings, progress)
    write_images(place, images, labels, names)
    typer.echo(f"{out}: images: {len(images)}, classes: {len(set(labels))}")


def _require_fitting(form: str, *, show_steps: bool, interpolate: tuple[str, str] | None, count: int | None) -> None:
    """Check options against each other.

    Raises:
        UsageError: they do not go together.
    """
    if form != "sheet" and (show_steps or interpolate):
        raise UsageError("--out: --show-steps and --interpolate write sheets; expected NAME.png.")
    if interpolate and (show_steps or count is not None):
        raise UsageError("--interpolate: not together with --show-steps or --count; --frames is the number of images.")


def _count(asked: int | None, numbers: Sequence[int]) -> int:
    """Return the number of images of these classes.

    Raises:
        UsageError: fewer than classes.
    """
    if asked is not None and asked < len(numbers):
        raise UsageError(f"--count {asked}: expected at least one image of each of the {len(numbers)} classes.")
    return max(COUNT, len(numbers)) if asked is None else asked


def _class_numbers(sampler: ImageSampler, wanted: Sequence[str], names: Sequence[str]) -> list[int]:
    """Return the numbers of classes, in order. Raises UsageError for an unknown one."""
    from svgpipe.stages.sample.classes import class_number

    return [class_number(name.strip(), sampler.trained, names) for name in wanted]


def _seeds(wanted: Sequence[str]) -> list[int]:
    """Return two seeds.

    Raises:
        UsageError: they are not numbers.
    """
    if not all(seed.isdecimal() for seed in wanted):
        raise UsageError(
            f"--interpolate {' '.join(wanted)}: with --classes, expected two seeds (numbers). Leave --classes out to "
            "interpolate between two classes."
        )
    return [int(seed) for seed in wanted]


@app.command(rich_help_panel=LOOK)
def edit(
    model: Annotated[str, typer.Argument(help="Finished diffusion model, or a checkpoint.")],
    image: Annotated[Path, typer.Argument(help="JPEG, PNG or WebP. Its centre square is edited.")],
    box: Annotated[str, typer.Option("--box", metavar="X,Y,W,H", help="Part to make anew, in pixels of that square.")],
    wanted: Annotated[str, typer.Option("--class", metavar="CLASS", help="Name or number of the class to make.")],
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="Folder for the page and the pictures.")],
    source_class: Annotated[
        str | None, typer.Option("--source-class", metavar="CLASS", help="Class of the image. Default: none.")
    ] = None,
    t_edit: Annotated[
        float, typer.Option("--t-edit", metavar="T", min=0, max=0.95, help="Integrate back to this time; 0: to noise.")
    ] = 0.0,
    count: Annotated[int, typer.Option("--count", metavar="N", min=1, max=64, help="Results.")] = 4,
    steps: Annotated[int, typer.Option("--steps", metavar="N", min=1, help="Euler steps.")] = 100,
    guidance: ScaleOption = 4.0,
    seed: SeedOption = 0,
    autoencoder: EncoderOption = None,
    ema: EmaOption = None,
    overrides: SetOption = None,
) -> None:
    """Make a part of an image anew under another class, by inversion; write a page.

    --set evaluation.KEY=VALUE changes other settings of the sampling, for example time_shift, here 0.4.
    """
    from svgpipe.stages.images.decode import centre_crop, to_array
    from svgpipe.stages.sample.edit import ImageEditor, read_image, require_box
    from svgpipe.stages.sample.pictures import require_new

    from .edit_page import write_edit

    folder, place, opened = location(out), _box(box), read_image(image)
    require_new(folder)
    editor = ImageEditor(model, autoencoder, ema or "ema")
    require_box(place, editor.size)
    sampler, names = editor.sampler, shown_names(editor.sampler.class_names)
    given = ("evaluation.time_shift=0.4", *(overrides or ()))
    settings = sampler.settings(*given, steps=steps, guidance=guidance, seed=seed)
    (label,) = _class_numbers(sampler, [wanted], names)
    source = None if source_class is None else _class_numbers(sampler, [source_class], names)[0]
    pixels = to_array(centre_crop(opened, editor.size))
    with ConsoleProgress() as progress:
        edited = editor.edit(
            pixels, place, label, settings, source_label=source, t_edit=t_edit, count=count, progress=progress
        )
    page = write_edit(
        folder,
        edited,
        place,
        settings,
        image=image.name,
        model=model,
        class_name=names[label],
        source_name=None if source is None else names[source],
        t_edit=t_edit,
    )
    each = ", ".join(f"{value:.2f}" for value in edited.outside)
    typer.echo(f"PSNR outside of the box: {each} dB; of the reconstruction {edited.outside_of_reconstruction:.2f} dB")
    typer.echo(f"page: {page}")


def _box(text: str) -> tuple[int, int, int, int]:
    """Return the four numbers of a box.

    Raises:
        UsageError: others than four whole numbers.
    """
    try:
        x, y, width, height = (int(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"--box {text}: expected four whole numbers x,y,width,height.") from error
    return x, y, width, height
