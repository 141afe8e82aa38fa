"""`svgpipe status`: progress of a pipeline, during the run or afterwards."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from svgpipe.manifests.filesystem import Location, children
from svgpipe.manifests.kinds import STUDY_FOLDERS, artifacts_below, read_any
from svgpipe.manifests.lock import describe, owner_of
from svgpipe.manifests.manifest import MANIFEST_NAME, Json, read_plan
from svgpipe.manifests.metrics_file import METRICS_NAME, read_metrics
from svgpipe.manifests.progress_file import ProgressEntry, read_progress
from svgpipe.manifests.study_results import RESULTS_NAME, StudyResults

# Metrics to show from the log, in this order.
SHOWN = (
    *("loss", "heldout_loss", "l1", "perceptual", "heldout_psnr", "latent_fd", "latent_accuracy"),
    *("grad_norm", "learning_rate", "samples_per_s", "images_per_s", "data_wait_share", "memory_gb"),
)
SILENT_S, WAITING_SHARE, LOW_DISK = 300.0, 0.1, 2e9


def status(path: Location) -> list[Json]:
    """Return one entry per artifact at or below `path`, in the order of the pipeline; before them that of a study.

    Raises:
        ArtifactError: there is no artifact, or one is damaged.
    """
    entries = [_entry(place, _name(place, path)) for place in artifacts_below(path)]
    return [_study_entry(path, entries), *entries] if (path / RESULTS_NAME).exists() else entries


def _study_entry(workdir: Location, stages: list[Json]) -> Json:
    """Return the entry of a study: how many of its variants are finished, and which are not."""
    results = StudyResults.read(workdir)
    missing = [variant.name for variant in results.variants if variant.state != "finished"]
    total = len(results.variants)
    finished = total - len(missing)
    parts = [place for name in STUDY_FOLDERS if (workdir / name).exists() for place in children(workdir / name)]
    # Measurements of latents and paths are no artifacts; they lock the folder of their tokenizer or model.
    running = any(stage["state"] == "running" for stage in stages) or any(owner_of(place) for place in parts)
    state = "running" if running else "stopped" if missing else "finished"
    now = time.time()
    done = ProgressEntry("finished", total, "variants", finished, now, finished, now)
    done.said += [f"not finished: {', '.join(missing)}"] if missing else []
    warnings = [f"variant {v.name} failed: {v.message}" for v in results.variants if v.state == "failed"]
    if state == "stopped":
        warnings.append(f"{len(missing)} of {total} variants are not made; run the same command to go on")
    return {
        "path": str(workdir),
        "name": f"study {results.name}",
        "kind": "study",
        "state": state,
        "seconds": sum(stage.get("seconds", 0.0) for stage in stages),
        "progress": _as_json(done),
        "metrics": {},
        "warnings": warnings,
    }


def _name(place: Location, below: Location) -> str:
    """Return the name of an artifact; in a study with its folder: `models/kl/diffusion`."""
    return place.name if place.parent in (below, below.parent) else str(place).removeprefix(f"{below}/")


def _entry(path: Location, name: str) -> Json:
    if (path / MANIFEST_NAME).exists():
        manifest = read_any(path)
        took = {"seconds": manifest.seconds, "finished_at": manifest.finished_at, "fingerprint": manifest.fingerprint}
        state: Json = {"kind": manifest.kind, "state": "finished", **took}
        progress, owner = None, None
    else:
        progress, owner = read_progress(path), owner_of(path)
        state = {"kind": read_plan(path)["kind"], "state": "stopped" if owner is None else "running"}
    metrics = _last_metrics(path)
    entry = {"path": str(path), "name": name, **state, "progress": _as_json(progress), "metrics": metrics}
    return entry | {"warnings": list(_warnings(path, state["state"], progress, owner, metrics))}


def _as_json(progress: ProgressEntry | None) -> Json | None:
    if progress is None:
        return None
    return {**asdict(progress), "per_second": progress.per_second, "seconds_left": progress.seconds_left}


def _last_metrics(path: Location) -> Json:
    """Return the newest value of every logged metric."""
    newest: Json = {}
    for line in read_metrics(path / METRICS_NAME):
        newest |= line
    return {name: newest[name] for name in ("step", *SHOWN) if name in newest}


def _warnings(
    path: Location, state: str, progress: ProgressEntry | None, owner: dict[str, Any] | None, metrics: Json
) -> Iterator[str]:
    if state == "stopped":
        yield "not running and not finished; run the same command to resume"
    if state == "running" and progress is not None and (silent := time.time() - progress.updated_at) > SILENT_S:
        yield f"no progress for {timedelta(seconds=round(silent))}, though it is {describe(owner or {})}"
    if state == "running" and metrics.get("data_wait_share", 0.0) > WAITING_SHARE:
        yield f"steps wait for data {metrics['data_wait_share']:.0%} of the time"
    if any(isinstance(value, float) and not math.isfinite(value) for value in metrics.values()):
        yield "the last metrics are not finite"
    if state != "finished" and isinstance(path, Path) and (free := shutil.disk_usage(path).free) < LOW_DISK:
        yield f"only {free / 1e9:.1f} GB are free"
    if state == "finished" and (count := getattr(read_any(path), "num_rejected", 0)):
        yield f"{count} images were rejected, see {path / 'rejected.jsonl'}"


def show_status(entries: list[Json], console: Console | None = None) -> None:
    """Print the result of `status`."""
    console = console or Console(highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("stage", "state", "progress", "", "left"):
        table.add_column(name)
    for entry in entries:
        table.add_row(*_row(entry))
    console.print(table)
    for entry in entries:
        if entry["metrics"]:
            values = "  ".join(f"{k} {_number(v)}" for k, v in entry["metrics"].items())
            console.print(Text(f"{entry['name']}: {values}"), soft_wrap=True)
        for line in (entry["progress"] or {}).get("said", [])[-2:]:
            console.print(Text(f"{entry['name']}: {line}"), soft_wrap=True)
    for entry in entries:
        for warning in entry["warnings"]:
            console.print(Text(f"warning: {entry['name']}: {warning}", style="yellow"), soft_wrap=True)


def _row(entry: Json) -> list[Any]:
    progress = entry["progress"]
    if entry["state"] == "finished":
        return [entry["name"], Text("finished", "green"), f"in {_duration(entry['seconds'])}", "", ""]
    state = Text(entry["state"], "cyan" if entry["state"] == "running" else "yellow")
    if progress is None:
        return [entry["name"], state, "", "", ""]
    bar = ProgressBar(total=max(1, progress["total"]), completed=progress["done"], width=12)
    left = progress["seconds_left"] if entry["state"] == "running" else None
    words = f"{progress['task']} {progress['done']}/{progress['total']} {progress['unit']}"
    if progress["per_second"] is not None and entry["state"] == "running":
        words += f", {_number(progress['per_second'])}/s"
    return [entry["name"], state, words, bar, "" if left is None else _duration(left)]


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _number(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
