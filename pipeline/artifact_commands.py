"""Commands that look at artifacts, check them and mend them."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from svgpipe.manifests.storage import location
from svgpipe.pipeline.options import AddressOption, CpusOption, GpusOption, WorkersOption, resources_of

app = typer.Typer()


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="Any artifact, finished or not, or a working directory.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a page.")] = False,
    html: Annotated[str | None, typer.Option("--html", help="A feature cache: write a page to look at.")] = None,
) -> None:
    """What an artifact holds, what it was made from, and whether it is finished."""
    from svgpipe.pipeline.inspect import describe, show

    if html is not None:
        from svgpipe.manifests import FeatureCache
        from svgpipe.pipeline.cache_page import render_cache

        render_cache(FeatureCache(path), location(html))
        typer.echo(f"page: {html}")
        return
    found = describe(location(path))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        show(found)


@app.command()
def verify(
    path: Annotated[str, typer.Argument(help="Any artifact, or a working directory.")],
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte: hashes, checksums, NaN.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """Whether an artifact is whole and is what its manifest says. Exit code 1 if it is not."""
    from svgpipe.manifests.kinds import artifacts_below
    from svgpipe.pipeline.console import ConsoleProgress
    from svgpipe.stages.verify import verify as run_stage

    places = artifacts_below(location(path))
    with ConsoleProgress() as progress:
        findings = {str(place): run_stage(place, deep=deep, progress=progress) for place in places}
    if as_json:
        typer.echo(json.dumps({place: [asdict(f) for f in found] for place, found in findings.items()}, indent=2))
    else:
        for place, found in findings.items():
            for finding in found:
                typer.echo(f"{finding.where}: {finding.problem}")
            how = "every byte was read" if deep else "sizes and small files; --deep reads every byte"
            typer.echo(f"{place}: {f'{len(found)} problems' if found else 'whole'} ({how})")
    if any(findings.values()):
        raise typer.Exit(1)


@app.command()
def repair(
    cache: Annotated[str, typer.Argument(help="Finished feature cache that `verify` has found damaged.")],
    shards: Annotated[str | None, typer.Option("--shards", help="Its shards, if they have moved.")] = None,
    autoencoder: Annotated[str | None, typer.Option("--autoencoder", help="Its autoencoder, if it has moved.")] = None,
    num_workers: WorkersOption = 1,
    cpus_per_worker: CpusOption = None,
    gpus_per_worker: GpusOption = None,
    address: AddressOption = None,
) -> None:
    """Extract again exactly what `verify --deep` names, back to the content that was published."""
    from svgpipe.manifests.shards import ShardSet
    from svgpipe.pipeline.cluster import connected
    from svgpipe.pipeline.console import ConsoleProgress
    from svgpipe.stages.repair import repair as run_stage

    resources = resources_of(num_workers, cpus_per_worker, gpus_per_worker)
    with connected(address), ConsoleProgress() as progress:
        findings = run_stage(
            location(cache),
            shards=None if shards is None else ShardSet.open(shards),
            autoencoder=None if autoencoder is None else location(autoencoder),
            resources=resources,
            progress=progress,
        )
    for finding in findings:
        typer.echo(f"mended: {finding.where}: {finding.problem}")
    typer.echo(f"{cache}: whole, with the content that was published")


@app.command()
def requantize(
    cache: Annotated[str, typer.Argument(help="Finished feature cache.")],
    out: Annotated[str, typer.Argument(help="Cache to create or resume.")],
    store_dtype: Annotated[str, typer.Option("--store-dtype", help="int8 or float16.")] = "int8",
    autoencoder: Annotated[
        str | None, typer.Option("--autoencoder", help="To decode with; default: where the cache says it lay.")
    ] = None,
    diffusion: Annotated[
        str | None, typer.Option("--diffusion", help="Model trained on the cache: what happens to its held-out loss.")
    ] = None,
) -> None:
    """The same cache in another dtype, and what that costs. Run again to resume."""
    from svgpipe.manifests import FeatureCache
    from svgpipe.manifests.errors import UsageError
    from svgpipe.manifests.manifest import MANIFEST_NAME, write_json
    from svgpipe.pipeline.console import ConsoleProgress, show_price
    from svgpipe.stages.price import PRICE_NAME, as_json, price
    from svgpipe.stages.requantize import requantize as run_stage

    if store_dtype not in ("int8", "float16"):
        raise UsageError(f"--store-dtype {store_dtype!r}: expected int8 or float16.")
    source, target = location(cache), location(out)
    with ConsoleProgress() as progress:
        run_stage(source, target, store_dtype, progress=progress)  # type: ignore[arg-type]
    reference = FeatureCache(source)
    where = location(autoencoder or reference.manifest.inputs["autoencoder"].path)
    found = price(
        reference,
        FeatureCache(target),
        autoencoder=where if autoencoder or (where / MANIFEST_NAME).exists() else None,
        diffusion=None if diffusion is None else location(diffusion),
    )
    write_json(target / PRICE_NAME, as_json(found))
    show_price(as_json(found))
