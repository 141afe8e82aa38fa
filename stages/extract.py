"""`svgpipe extract`: shard set → normalised feature cache, on Ray workers.

    read + decode (CPU tasks) → encoder actors → write (CPU tasks)

The unit of work is one outer Zarr shard. A calibration pass over an evenly spread subset fixes the channel
statistics before anything is written; each unit is then written whole, by one writer, followed by its journal
record. A run that was interrupted does the missing units and ends in the same bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from svgpipe.manifests.cache import CacheManifest, FeatureStore, StoreSpec
from svgpipe.manifests.checkpoint import AutoencoderManifest
from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.manifest import WorkDir, digest, read_json, write_json
from svgpipe.manifests.recipe import ExtractSection
from svgpipe.manifests.shards import Rows, ShardSet
from svgpipe.stages.encoder import load_autoencoder
from svgpipe.stages.extract_tasks import CollectMoments, ReadImages, WriteUnit
from svgpipe.stages.images import RGBArray
from svgpipe.stages.moments import Moments, merge_all
from svgpipe.stages.progress import Progress, Silent
from svgpipe.stages.streaming import evenly_spread
from svgpipe.stages.training import autocast
from svgpipe.stages.units import Resources, Row, run_units, start_worker

# A channel that never varies would be divided by zero; it is left as it is.
SMALLEST_STD = 1e-6


def extract(
    shards: ShardSet,
    autoencoder: Path,
    out: Path,
    config: ExtractSection,
    *,
    resources: Resources | None = None,
    progress: Progress | None = None,
) -> CacheManifest:
    """Encode every image of `shards` once and publish the cache at `out`; run again to resume.

    Ray must be connected. An image that cannot be decoded is recorded as a reject and keeps its row,
    with `valid` False and zeros: samples = valid + rejected.

    Raises:
        MismatchError: `out` was begun with another encoder, other shards or another config.
        ArtifactError: a damaged input, or a feature that is not finite.
    """
    resources, progress = resources or Resources(), progress or Silent()
    encoder = AutoencoderManifest.read(autoencoder)
    inputs = {"shards": shards.as_input(), "autoencoder": encoder.as_input(autoencoder)}
    work = WorkDir(out, CacheManifest, config.model_dump(mode="json"), inputs)
    if work.finished is not None:
        return work.finished
    rows = shards.rows
    if not len(rows):
        raise ArtifactError(f"{shards.directory}: expected images to extract, found none.")
    job = _Job(shards, rows, autoencoder, encoder, config, resources)
    calibration = _calibrate(job, out / "calibration.json", progress)
    mean, std = (np.asarray(calibration[k], np.float32) for k in ("mean", "std"))
    journal = Journal(out / "journal")
    spec = StoreSpec(
        num_samples=len(rows),
        views=config.views,
        grid=encoder.grid,
        channels=encoder.frozen_channels + encoder.residual_channels,
        unit_rows=config.unit_rows,
        class_names=tuple(shards.manifest.class_names),
    )
    # Before the first journal record, nothing that an earlier run left can be of use.
    store = FeatureStore(out, spec) if journal.finished() else FeatureStore.create(out, spec, mean, std)
    missing = journal.missing(spec.num_units)
    progress.begin("extract", len(rows), len(rows) - sum(len(spec.rows_of(u)) for u in missing))
    items = [{"unit": unit, "refs": job.refs(list(spec.rows_of(unit)))} for unit in missing]
    worker_args = {**job.worker_args, "mean": mean, "std": std, "views": config.views}
    for done in run_units(
        items, ReadImages(encoder.image_size), _Encode, worker_args, WriteUnit(store, journal), resources
    ):
        progress.advance(len(spec.rows_of(int(done["unit"]))))
    return _publish(work, store, journal, job, progress)


@dataclass(frozen=True)
class _Job:
    shards: ShardSet
    rows: Rows
    autoencoder: Path
    encoder: AutoencoderManifest
    config: ExtractSection
    resources: Resources

    def refs(self, rows: list[int]) -> str:
        """Where the images of `rows` lie, as one string: Ray passes it on untouched."""
        index, shards = self.rows, self.shards
        return json.dumps(
            [
                [
                    str((shards.directory / shards.shards[int(index.shard[r])].name).resolve()),
                    int(index.offset[r]),
                    int(index.size[r]),
                    index.sha256[r],
                    index.key[r],
                ]
                for r in rows
            ]
        )

    @property
    def batch_size(self) -> int:
        """Images per forward: short batches are filled up to it, so it should not exceed what a unit holds."""
        return min(self.config.batch_size, self.config.unit_rows, len(self.rows))

    @property
    def worker_args(self) -> dict[str, Any]:
        return {
            "autoencoder": self.autoencoder.resolve(),
            "batch_size": self.batch_size,
            "precision": self.config.precision,
            "threads": self.resources.threads,
        }


class _Encode:
    """Actor: pixels → normalised float16 features of every view."""

    def __init__(
        self,
        autoencoder: Path,
        batch_size: int,
        precision: Any,
        threads: int,
        mean: NDArray[np.float32] | None = None,
        std: NDArray[np.float32] | None = None,
        views: tuple[str, ...] = ("original",),
    ) -> None:
        self.device = start_worker(threads)
        self.model, _ = load_autoencoder(autoencoder)
        self.model.to(self.device)
        self.batch_size, self.precision, self.views = batch_size, precision, views
        self.mean, self.std = (None if v is None else torch.from_numpy(v).to(self.device) for v in (mean, std))

    @torch.inference_mode()
    def encode(self, pixels: RGBArray, flip: bool) -> torch.Tensor:
        """(n,S,S,3) uint8 → (n,row,column,channel) float32, un-normalised."""
        images = torch.from_numpy(np.array(pixels)).to(self.device).permute(0, 3, 1, 2).float() / 255
        if flip:
            images = images.flip(-1)
        # A short last batch is filled up, so that every image meets the same kernels in any batch.
        short = self.batch_size - len(images)
        padded = torch.cat([images, images.new_zeros(short, *images.shape[1:])]) if short > 0 else images
        with autocast(self.device, self.precision):
            return self.model.encode(padded)[: len(images)].float().permute(0, 2, 3, 1)

    def __call__(self, row: Row) -> Row:
        pixels = row["pixels"]
        rejected = [reject["row"] for reject in json.loads(row["rejects"])]
        per_view = []
        for view in self.views:
            starts = range(0, len(pixels), self.batch_size)
            parts = [self.encode(pixels[s : s + self.batch_size], view == "flip") for s in starts]
            per_view.append(torch.cat(parts))
        features = torch.stack(per_view, dim=1)
        if self.mean is not None and self.std is not None:
            features = (features - self.mean) / self.std
        values = features.cpu().numpy()
        if self.mean is not None:
            values = values.astype(np.float16)
        values[rejected] = 0
        bad = np.flatnonzero(~np.isfinite(values).all(axis=tuple(range(1, values.ndim))))
        if bad.size:
            raise ArtifactError(
                f"unit {row['unit']}: row {bad[0]} of it: a feature is not a finite float16 number. "
                "Extract with --set extract.precision=float32, or check the autoencoder."
            )
        return {"unit": row["unit"], "features": values, "rejects": row["rejects"]}


def _calibrate(job: _Job, path: Path, progress: Progress) -> dict[str, Any]:
    """Mean and std per channel over evenly spread training rows, measured once and kept for every resume."""
    if path.exists():
        return read_json(path)
    training = np.flatnonzero(~job.rows.heldout)
    pool = training if len(training) else np.arange(len(job.rows))
    chosen = [int(pool[i]) for i in evenly_spread(len(pool), job.config.calibration_images)]
    size = job.batch_size
    chunks = [chosen[i : i + size] for i in range(0, len(chosen), size)]
    items = [{"unit": i, "refs": job.refs(chunk)} for i, chunk in enumerate(chunks)]
    progress.begin("calibrate", len(chosen))
    parts: dict[int, Moments] = {}
    reader = ReadImages(job.encoder.image_size)
    for done in run_units(items, reader, _Encode, job.worker_args, CollectMoments(), job.resources):
        parts[int(done["unit"])] = Moments.from_json(json.loads(done["moments"]))
        progress.advance(len(chunks[int(done["unit"])]))
    total = merge_all((parts[i] for i in sorted(parts)), len(next(iter(parts.values())).mean))
    if total.count == 0:
        raise ArtifactError(f"{job.shards.directory}: none of {len(chosen)} calibration images could be decoded.")
    std = total.std
    constant = np.flatnonzero(std < SMALLEST_STD)
    if constant.size:
        progress.say(f"channels {constant.tolist()} are constant; stored without division")
        std[constant] = 1.0
    # Rounded to float32 here, so that a resumed run normalises with the very same numbers.
    entry = {
        "images": len(chosen),
        "mean": total.mean.astype(np.float32).tolist(),
        "std": std.astype(np.float32).tolist(),
    }
    write_json(path, entry)
    return entry


def _publish(
    work: WorkDir[CacheManifest], store: FeatureStore, journal: Journal, job: _Job, progress: Progress
) -> CacheManifest:
    spec, rows = store.spec, job.rows
    records = [journal.read(unit) for unit in range(spec.num_units)]
    valid = np.ones(len(rows), bool)
    rejected = []
    for unit, record in enumerate(records):
        for reject in record["rejects"]:
            row = spec.rows_of(unit)[reject["row"]]
            valid[row] = False
            rejected.append({**reject, "row": row})
    store.put("label", rows.label)
    store.put("valid", valid)
    store.put("heldout", rows.heldout)
    written = merge_all((Moments.from_json(record["moments"]) for record in records), spec.channels)
    store.put("stored_mean", written.mean.astype(np.float32), "channel")
    store.put("stored_std", written.std.astype(np.float32), "channel")
    (work.path / "rejected.jsonl").write_text("".join(json.dumps(r, sort_keys=True) + "\n" for r in rejected))
    for reject in rejected:
        progress.say(f"row {reject['row']} is not valid: {reject['reason']}")
    backbone = job.encoder.config["backbone"]
    small = {
        name: digest(store.array(name).tolist())
        for name in ("label", "valid", "heldout", "channel_mean", "channel_std")
    }
    manifest = CacheManifest(
        config=work.config,
        inputs=work.inputs,
        seconds=work.seconds,
        num_samples=len(rows),
        num_valid=int(valid.sum()),
        num_rejected=len(rejected),
        num_heldout=int(rows.heldout.sum()),
        feature_shape=(*spec.grid, spec.channels),
        frozen_channels=job.encoder.frozen_channels,
        views=list(spec.views),
        unit_rows=spec.unit_rows,
        class_names=list(spec.class_names),
        backbone=backbone["name"],
        backbone_weights=backbone["weights"],
        content=digest([[record["sha256"] for record in records], small]),
        num_bytes=sum(record["num_bytes"] for record in records),
    ).sealed()
    store.describe({"svgpipe": manifest.model_dump(mode="json", exclude={"finished_at", "seconds"})})
    return manifest.publish(work.path)
