"""The command line. Commands are thin: parse, open inputs, call one stage, say where the result is.

Heavy imports happen inside the commands: `svgpipe --help` must not load torch, and training from a cache must not
load timm or webdataset.
"""

from __future__ import annotations

import errno
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from svgpipe.manifests.errors import SvgpipeError
from svgpipe.manifests.manifest import svgpipe_version

if TYPE_CHECKING:
    from svgpipe.stages.units import Resources

app = typer.Typer(
    help="Shard images, cache their features, train diffusion from the cache, sample and evaluate.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

RecipeOption = Annotated[
    str | None, typer.Option("--recipe", help="Built-in recipe or a .yaml file; without it, defaults.")
]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="section.key=value; may be repeated.")]
OutOption = Annotated[Path, typer.Option("--out", help="Directory to create or resume.")]
ShardsOption = Annotated[
    str, typer.Option("--shards", help="Shard set, or tars of one: 'path/shard-{000000..000009}.tar'.")
]
AutoencoderOption = Annotated[Path, typer.Option("--autoencoder", help="Finished autoencoder.")]
WorkersOption = Annotated[int, typer.Option("--num-workers", min=1, help="Encoder or sampler actors.")]
CpusOption = Annotated[
    float | None,
    typer.Option("--cpus-per-worker", min=0.1, help="CPUs each actor asks Ray for; default 1 or its share."),
]
GpusOption = Annotated[
    float | None, typer.Option("--gpus-per-worker", min=0, help="GPUs each actor asks for; default 1 if there is any.")
]
AddressOption = Annotated[str | None, typer.Option("--address", help="Ray cluster; without it, this machine.")]


def _resources(num_workers: int, cpus: float | None, gpus: float | None) -> Resources:
    import torch

    from svgpipe.stages.units import Resources

    return Resources(num_workers, cpus, gpus if gpus is not None else float(torch.cuda.is_available()))


@app.command()
def shard(
    source: Annotated[Path, typer.Argument(help="Folder of class folders with JPEG, PNG or WebP images.")],
    out: Annotated[Path, typer.Argument(help="Shard set to create or resume.")],
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    holdout: Annotated[
        float | None, typer.Option(min=0, max=0.99, help="Fraction of every class kept out of training.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 is one per core.")] = 0,
) -> None:
    """Image folder → WebDataset tars with an index. Run again to resume."""
    from svgpipe.manifests.recipe import load_recipe
    from svgpipe.pipeline.console import ConsoleProgress
    from svgpipe.stages.shard import shard as run_stage

    extra = [] if holdout is None else [f"shard.holdout={holdout}"]
    config = load_recipe(recipe, [*(overrides or []), *extra]).shard
    with ConsoleProgress() as progress:
        manifest = run_stage(source, out, config, workers=workers, progress=progress)
    typer.echo(
        f"{out}: {manifest.num_images} images of {len(manifest.class_names)} classes in {len(manifest.shards)} tars; "
        f"{manifest.num_inputs} inputs = {manifest.num_images} stored + {manifest.num_rejected} rejected"
        + (f" (see {out / 'rejected.jsonl'})" if manifest.num_rejected else "")
    )


@app.command()
def train_autoencoder(
    shards: ShardsOption, out: OutOption, recipe: RecipeOption = None, overrides: SetOption = None
) -> None:
    """Residual encoder and decoder beside the frozen backbone. Run again to resume."""
    from svgpipe.manifests.recipe import load_recipe
    from svgpipe.manifests.shards import ShardSet
    from svgpipe.pipeline.console import ConsoleProgress
    from svgpipe.stages.train_autoencoder import train_autoencoder as run_stage

    config = load_recipe(recipe, overrides or []).autoencoder
    with ConsoleProgress() as progress:
        manifest = run_stage(ShardSet.open(shards), out, config, progress=progress)
    psnr = "not measured" if manifest.heldout_psnr is None else f"{manifest.heldout_psnr:.2f} dB"
    typer.echo(f"{out}: autoencoder {manifest.fingerprint[:12]}, held-out PSNR {psnr}")


@app.command()
def extract(
    shards: ShardsOption,
    autoencoder: AutoencoderOption,
    out: OutOption,
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    num_workers: WorkersOption = 1,
    cpus_per_worker: CpusOption = None,
    gpus_per_worker: GpusOption = None,
    address: AddressOption = None,
) -> None:
    """Shard set → normalised feature cache, on Ray workers. Run again to resume."""
    from svgpipe.manifests.recipe import load_recipe
    from svgpipe.manifests.shards import ShardSet
    from svgpipe.pipeline.cluster import connected
    from svgpipe.pipeline.console import ConsoleProgress
    from svgpipe.stages.extract import extract as run_stage

    config = load_recipe(recipe, overrides or []).extract
    opened = ShardSet.open(shards)
    resources = _resources(num_workers, cpus_per_worker, gpus_per_worker)
    with connected(address), ConsoleProgress() as progress:
        manifest = run_stage(opened, autoencoder, out, config, resources=resources, progress=progress)
    rows, columns, channels = manifest.feature_shape
    typer.echo(
        f"{out}: {manifest.num_samples} samples = {manifest.num_valid} valid + {manifest.num_rejected} rejected, "
        f"{len(manifest.views)} views of {rows}x{columns}x{channels}, {manifest.num_bytes / 1e6:.1f} MB"
    )


@app.command()
def train_diffusion(
    cache: Annotated[Path, typer.Option("--cache", help="Finished feature cache; nothing else is needed.")],
    out: OutOption,
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    autoencoder: Annotated[
        Path | None, typer.Option("--autoencoder", help="Only for sample grids while training.")
    ] = None,
) -> None:
    """Diffusion transformer, purely from the cache. Run again to resume."""
    from svgpipe.manifests import FeatureCache
    from svgpipe.manifests.recipe import load_recipe
    from svgpipe.pipeline.console import ConsoleProgress
    from svgpipe.stages.train_diffusion import train_diffusion as run_stage

    config = load_recipe(recipe, overrides or []).diffusion
    opened = FeatureCache(cache)
    decode = None
    if autoencoder is not None:
        from svgpipe.manifests.checkpoint import AutoencoderManifest
        from svgpipe.manifests.manifest import require_same
        from svgpipe.stages.decoding import latent_decoder

        require_same(
            str(cache),
            opened.manifest.inputs["autoencoder"],
            AutoencoderManifest.read(autoencoder),
            autoencoder,
            what_to_do="Give the autoencoder that extracted the cache.",
        )
        decode = latent_decoder(autoencoder)
    with ConsoleProgress() as progress:
        manifest = run_stage(opened, out, config, decode=decode, progress=progress)
    loss = "not measured" if manifest.heldout_loss is None else f"{manifest.heldout_loss:.4f}"
    typer.echo(f"{out}: diffusion model {manifest.fingerprint[:12]}, held-out loss {loss}")


def _numbers(text: str | None, name: str) -> list[str]:
    return [] if text is None else [f"evaluation.{name}=[{text}]"]


@app.command()
def sample_and_eval(
    diffusion: Annotated[Path, typer.Option("--diffusion", help="Finished diffusion model.")],
    autoencoder: AutoencoderOption,
    reference: Annotated[str, typer.Option("--reference", help="Shard set that distances are measured against.")],
    out: OutOption,
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    steps: Annotated[str | None, typer.Option("--steps", help="For example 5,10,25.")] = None,
    guidance: Annotated[str | None, typer.Option("--guidance", help="For example 1.0,1.5.")] = None,
    num_workers: WorkersOption = 1,
    cpus_per_worker: CpusOption = None,
    gpus_per_worker: GpusOption = None,
    address: AddressOption = None,
) -> None:
    """A sweep of steps and guidance: latents, images, distances, report. Run again to resume."""
    from svgpipe.manifests.recipe import load_recipe
    from svgpipe.manifests.shards import ShardSet
    from svgpipe.pipeline.cluster import connected
    from svgpipe.pipeline.console import ConsoleProgress
    from svgpipe.pipeline.report import render_report
    from svgpipe.stages.sample_and_eval import sample_and_eval as run_stage

    extra = _numbers(steps, "steps") + _numbers(guidance, "guidance")
    config = load_recipe(recipe, [*(overrides or []), *extra]).evaluation
    opened = ShardSet.open(reference)
    resources = _resources(num_workers, cpus_per_worker, gpus_per_worker)
    with connected(address), ConsoleProgress() as progress:
        run_stage(diffusion, autoencoder, opened, out, config, resources=resources, progress=progress)
    typer.echo(f"report: {render_report(out, autoencoder, diffusion, opened)}")


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="Built-in recipe or a .yaml file.")],
    workdir: Annotated[Path, typer.Option("--workdir", help="Holds one directory per stage.")],
    source: Annotated[str | None, typer.Option("--source", help="Image folder, instead of the recipe's.")] = None,
    overrides: SetOption = None,
    num_workers: WorkersOption = 1,
    cpus_per_worker: CpusOption = None,
    gpus_per_worker: GpusOption = None,
    address: AddressOption = None,
) -> None:
    """All stages in order, skipping what is finished and unchanged. Run again to resume."""
    from svgpipe.manifests.recipe import load_recipe
    from svgpipe.pipeline.console import ConsoleProgress
    from svgpipe.pipeline.run import run_recipe

    loaded = load_recipe(recipe, overrides or [])
    resources = _resources(num_workers, cpus_per_worker, gpus_per_worker)
    with ConsoleProgress() as progress:
        report = run_recipe(loaded, workdir, source=source, resources=resources, address=address, progress=progress)
    typer.echo(f"report: {report}")


@app.command()
def demo(
    workdir: Annotated[Path, typer.Option("--workdir", help="Holds one directory per stage.")] = Path("runs/demo"),
    overrides: SetOption = None,
) -> None:
    """The whole pipeline on eight photographs, on a CPU, with no account and no download."""
    run(recipe="demo", workdir=workdir, overrides=overrides)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Any artifact, finished or not, or a working directory.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a page.")] = False,
) -> None:
    """What an artifact holds, what it was made from, and whether it is finished."""
    from svgpipe.pipeline.inspect import describe, show

    found = describe(path)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        show(found)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"svgpipe {svgpipe_version()}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    del version


def _explain(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}no space left on the device. What was finished is kept; free space and run the command again."
    return f"{where}{error.strerror or error}. What was finished is kept."


def _show_log() -> None:
    """svgpipe's own log lines (which attention kernel was chosen, say) on stderr; no other library's."""
    log = logging.getLogger("svgpipe")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False


def _stopped() -> int:
    typer.echo("stopped. What was finished is kept; the same command resumes.", err=True)
    return 130


def _interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: landing in another library's lock, it can surface as a RuntimeError."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code. A user's mistake prints one message, never a traceback."""
    _show_log()
    try:
        result = app(arguments, standalone_mode=False, prog_name="svgpipe")
    except SvgpipeError as error:
        typer.echo(f"error: {error}", err=True)
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _stopped()
    except OSError as error:
        typer.echo(f"error: {_explain(error)}", err=True)
        return 1
    except Exception as error:
        if _interrupted(error):
            return _stopped()
        # Usage errors: click's own class, which newer typer versions carry inside and do not export.
        show = getattr(error, "show", None)
        if not callable(show):
            raise
        show()
        return 2
    # typer turns Ctrl-C into a result of 130, without a word.
    return _stopped() if result == 130 else result if isinstance(result, int) else 0


def entry() -> None:
    """Console script."""
    sys.exit(main())
