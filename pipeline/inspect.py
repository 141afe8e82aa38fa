"""`svgpipe inspect`: one screen about any artifact."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from svgpipe.manifests.alignment import MeasuredAlignment
from svgpipe.manifests.cache import FeatureCache
from svgpipe.manifests.cache_manifest import VISION_FROM
from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.estimate import Estimate
from svgpipe.manifests.evaluation import EvaluationManifest, Report
from svgpipe.manifests.filesystem import Location, children
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.kinds import artifacts_below, read_any
from svgpipe.manifests.label_maps import LabelMapsManifest
from svgpipe.manifests.lock import describe as describe_owner
from svgpipe.manifests.lock import owner_of
from svgpipe.manifests.manifest import MANIFEST_NAME, PLAN_NAME, InputRef, Json, read_json, read_plan
from svgpipe.manifests.model_manifests import AutoencoderManifest, DiffusionManifest
from svgpipe.manifests.reconstruction import ReconstructionManifest, ReconstructionReport
from svgpipe.manifests.shards import ShardSet, ShardSetManifest
from svgpipe.stages.artifacts.cache_statistics import CacheStatistics

from .synsets import shown_name, shown_names


def describe(path: Location) -> Json:
    """Return facts about an artifact as JSON values, or {"workdir": …, "artifacts": […]} for a folder of artifacts.

    Raises:
        ArtifactError: there is no artifact, or its manifest is damaged.
    """
    if (path / MANIFEST_NAME).exists():
        return _describe_finished(path)
    if (path / PLAN_NAME).exists():
        return _describe_unfinished(path)
    return {"workdir": str(path), "artifacts": [describe(p) for p in artifacts_below(path)]}


def _describe_finished(path: Location) -> Json:
    manifest = read_any(path)
    kind = manifest.kind
    return {
        "path": str(path),
        "kind": kind,
        "finished": True,
        "fingerprint": manifest.fingerprint,
        "finished_at": manifest.finished_at,
        "seconds": manifest.seconds,
        "svgpipe_version": manifest.svgpipe_version,
        "facts": _FACTS[kind](path, manifest),
        "inputs": {name: _lineage(ref) for name, ref in manifest.inputs.items()},
        "config": manifest.config,
    }


def _describe_unfinished(path: Location) -> Json:
    plan = read_plan(path)
    facts: Json = {}
    inner = [f"journal/{child.name}" for child in children(path / "journal") if child.suffix == ""]
    for name in ["journal", *inner]:
        if count := len(Journal(path, name).names()):
            facts[f"{name.rpartition('/')[2]}: units finished"] = count
    if (owner := owner_of(path)) is not None:
        facts["now"] = describe_owner(owner)
    latest = path / "checkpoints" / "latest.json"
    if latest.exists():
        facts["checkpoint at step"] = read_json(latest)["checkpoints"][-1]["step"]
    return {
        "path": str(path),
        "kind": plan["kind"],
        "finished": False,
        "facts": facts or {"progress": "nothing is finished in this directory"},
        "inputs": {name: {"fingerprint": fingerprint} for name, fingerprint in plan["inputs"].items()},
        "config": plan["config"],
    }


def _lineage(ref: InputRef) -> Json:
    inputs = {name: _lineage(child) for name, child in ref.inputs.items()}
    return {
        "kind": ref.kind,
        "fingerprint": ref.fingerprint,
        "path": ref.path,
        **({"inputs": inputs} if inputs else {}),
    }


def _shard_facts(path: Location, manifest: Any) -> Json:
    assert isinstance(manifest, ShardSetManifest)
    rows = ShardSet.open(path).rows
    labels = np.bincount(rows.label[~rows.rejected], minlength=len(manifest.class_names))  # rejects may have none
    trained = np.bincount(rows.label[~rows.rejected & ~rows.heldout], minlength=len(labels))
    rejects = [json.loads(line) for line in (path / "rejected.jsonl").read_text().splitlines()]
    return {
        "images": f"{manifest.num_images} in {len(manifest.shards)} tars, {manifest.num_heldout} held out"
        + (f", {rows.damaged.sum()} damaged JPEGs kept" if rows.damaged.any() else ""),
        "inputs": f"{manifest.num_inputs} = {manifest.num_images} stored + {manifest.num_rejected} rejected",
        "rejected because": dict(Counter(r["reason"] for r in rejects).most_common(5)),
        "classes": f"{len(manifest.class_names)}: {_some(manifest.class_names)}",
        "images per class": f"{labels.min()} to {labels.max()}",
        **_classes_without_images(manifest.class_names, np.flatnonzero(trained == 0).tolist()),
        "bytes": sum(shard.num_bytes for shard in manifest.shards),
    }


def _classes_without_images(names: list[str], empty: list[int]) -> Json:
    """Return a fact if some class has no training image."""
    some = _some([f"{index} ({shown_name(names[index])})" for index in empty])
    return {"classes without training images": f"{len(empty)} of {len(names)}: {some}"} if empty else {}


def _autoencoder_facts(path: Location, manifest: Any) -> Json:
    assert isinstance(manifest, AutoencoderManifest)
    section, measured = manifest.section, MeasuredAlignment.read(path)
    backbone = f"{section.backbone.title}, weights {section.backbone.weights} ({manifest.backbone_weights[:12]})"
    scalars = manifest.alignment or (None if measured is None else list(measured.scalars))
    role = "backbone" if section.encodes_with_backbone else "backbone in training"
    return {
        "tokenizer": section.kind,
        **({role: backbone} if manifest.backbone_weights else {}),
        "latent": f"{manifest.grid[0]}x{manifest.grid[1]} x {_channels(manifest)} from {manifest.image_size} px",
        "steps": manifest.steps,
        "held-out PSNR (dB)": None if manifest.heldout_psnr is None else round(manifest.heldout_psnr, 2),
        **({"alignment scalars": scalars} if section.kind == "svg" else {}),
        "reconstructions": manifest.reconstruction_grid and str(path / manifest.reconstruction_grid),
    }


def _channels(manifest: AutoencoderManifest) -> str:
    if manifest.posterior_channels:
        return f"{manifest.posterior_channels} (stored: mean and standard deviation)"
    return f"({manifest.frozen_channels} frozen + {manifest.residual_channels} residual)"


def _cache_facts(path: Location, manifest: Any) -> Json:
    cache = FeatureCache(path)
    statistics = CacheStatistics.of(cache)
    return {
        "samples": f"{len(cache)} = {manifest.num_valid} valid + {manifest.num_rejected} rejected, "
        f"{manifest.num_heldout} held out",
        "shape": "x".join(map(str, cache.shape)) + f" {manifest.store_dtype} (sample, view, row, column, channel)",
        "views": cache.views,
        **({"distribution": "gaussian: means and standard deviations"} if manifest.distribution == "gaussian" else {}),
        "encoder": f"{manifest.backbone}, weights {manifest.backbone_weights}",
        "classes": f"{len(cache.classes)}: {_some(cache.classes)}",
        **_classes_without_images(cache.classes, cache.untrained_classes),
        "bytes": manifest.num_bytes,
        "stored mean, most distant from 0": round(float(statistics.mean[np.abs(statistics.mean).argmax()]), 4),
        "stored std": f"{statistics.std.min():.4f} to {statistics.std.max():.4f}",
        "effective rank": f"{statistics.effective_rank:.1f} of {len(statistics.mean)} channels",
        **({"warning": statistics.warnings[0]} if statistics.warnings else {}),
        "extraction": manifest.timings.get("advice", "not timed"),
        **({"vision features": f"copied from {source}"} if (source := manifest.timings.get(VISION_FROM)) else {}),
    }


def _diffusion_facts(path: Location, manifest: Any) -> Json:
    assert isinstance(manifest, DiffusionManifest)
    return {
        "parameters": manifest.num_parameters,
        "tokens": f"{manifest.grid[0]}x{manifest.grid[1]} of {manifest.channels} channels",
        "classes": f"{len(manifest.class_names)}: {_some(manifest.class_names)}",
        **_classes_without_images(manifest.class_names, manifest.untrained_classes),
        "steps": manifest.steps,
        "held-out loss": manifest.heldout_loss,
    }


def _evaluation_facts(path: Location, manifest: Any) -> Json:
    assert isinstance(manifest, EvaluationManifest)
    try:
        report = Report.read(path)
    except ArtifactError as error:  # for example another layout: show at least the facts of the manifest
        return {"report": str(error), "samples per setting": manifest.num_samples}
    distances = {r.name: round(r.frechet_distance.value, 3) for r in report.results}
    return {"metric": report.metric, "distances": distances, "samples per setting": manifest.num_samples}


def _reconstruction_facts(path: Location, manifest: Any) -> Json:
    assert isinstance(manifest, ReconstructionManifest)
    try:
        report = ReconstructionReport.read(path)
    except ArtifactError as error:
        return {"report": str(error), "held-out images": manifest.num_images}
    values = {r.name: {name: _rounded(getattr(r, name)) for name in _RECONSTRUCTED} for r in report.results}
    return {"metric": report.metric, "held-out images": manifest.num_images, **values}


def _label_map_facts(path: Location, manifest: Any) -> Json:
    assert isinstance(manifest, LabelMapsManifest)
    return {
        "rows": manifest.num_samples,
        "labels per image": f"{manifest.size}x{manifest.size}",
        "images with a mask": manifest.num_segmentation,
        "classes": _some(manifest.classes),
        "images with a depth map": manifest.num_depth,
        "rejected maps": manifest.num_rejected,
    }


def _rounded(estimate: Estimate | None) -> float | None:
    return None if estimate is None else round(estimate.value, 4)


_RECONSTRUCTED = ("psnr", "ssim", "lpips", "colour_difference", "frechet_distance")
_FACTS: dict[str, Callable[[Location, Any], Json]] = {
    "shard-set": _shard_facts,
    "autoencoder": _autoencoder_facts,
    "feature-cache": _cache_facts,
    "diffusion": _diffusion_facts,
    "evaluation": _evaluation_facts,
    "reconstruction": _reconstruction_facts,
    "label-maps": _label_map_facts,
}


def _some(names: list[str]) -> str:
    return ", ".join(shown_names(names[:8])) + (", …" if len(names) > 8 else "")


def show(description: Json, console: Console | None = None) -> None:
    """Print the result of `describe`."""
    console = console or Console(highlight=False)
    for artifact in description.get("artifacts", [description]):
        console.print(_panel(artifact))


def _panel(artifact: Json) -> Panel:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    if artifact["finished"]:
        seconds = f"{artifact['seconds']:.0f} s"
        table.add_row("finished", f"{artifact['finished_at']} in {seconds}, svgpipe {artifact['svgpipe_version']}")
        table.add_row("fingerprint", artifact["fingerprint"])
    else:
        table.add_row("unfinished", "run the command that makes it again; it resumes")
    for name, value in artifact["facts"].items():
        if isinstance(value, dict):
            value = "\n".join(f"{k}: {v}" for k, v in value.items()) or "none"
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        table.add_row(name, Text(str(value)))
    for name, ref in artifact["inputs"].items():
        table.add_row(f"from {name}", Text(f"{ref['fingerprint'][:12]}  {ref.get('path', '')}"))
    return Panel(table, title=Text(f"{artifact['kind']}  {artifact['path']}"), title_align="left")
