"""The command that shows images of a finished diffusion model."""

from __future__ import annotations

from typing import Annotated

import typer

from svgpipe.manifests.filesystem import location

from .console import ConsoleProgress
from .options import LOOK, EmaOption, SetOption
from .synsets import shown_names

app = typer.Typer()


@app.command(rich_help_panel=LOOK)
def sample(
    model: Annotated[str, typer.Argument(help="Finished diffusion model, or a checkpoint.")],
    out: Annotated[
        str,
        typer.Option(
            "--out", metavar="FILE|DIR", help="NAME.png: one sheet. NAME.npz: all images. Folder: single .png files."
        ),
    ],
    classes: Annotated[
        str | None, typer.Option("--classes", metavar="C,C,…", help="Names or numbers of classes. Default: all.")
    ] = None,
    count: Annotated[int, typer.Option("--count", metavar="N", min=1, help="Images, shared by the classes.")] = 16,
    steps: Annotated[
        int | None, typer.Option("--steps", metavar="N", min=1, help="Sampling steps. Default: diffusion.sample_steps.")
    ] = None,
    guidance: Annotated[float, typer.Option("--guidance", metavar="W", min=0, help="Guidance scale; 1: none.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of the noise.")] = 0,
    autoencoder: Annotated[
        str | None,
        typer.Option("--autoencoder", metavar="DIR", help="Decodes. Default: the autoencoder of the model's cache."),
    ] = None,
    ema: EmaOption = None,
    overrides: SetOption = None,
) -> None:
    """Sample images of some classes: a sheet, single files or an .npz.

    --set evaluation.KEY=VALUE changes all other settings of the sampling.
    """
    from svgpipe.stages.sample.classes import class_number, labels_in_order
    from svgpipe.stages.sample.image_sampler import load
    from svgpipe.stages.sample.pictures import form_of, write_images

    place = location(out)
    form_of(place)
    sampler = load(model, autoencoder, ema or "ema")
    shown = shown_names(sampler.class_names)
    wanted = list(sampler.trained.classes or range(len(shown)))
    if classes is not None:
        given = [name.strip() for name in classes.split(",") if name.strip()]
        wanted = list(dict.fromkeys(class_number(name, sampler.trained, shown) for name in given))
    labels = labels_in_order(wanted, count)
    with ConsoleProgress() as progress:
        images = sampler.sample(
            labels, steps=steps, guidance=guidance, seed=seed, overrides=overrides or (), progress=progress
        )
    write_images(place, images, labels, shown)
    typer.echo(f"{out}: {len(images)} images of {len(set(labels))} classes")
