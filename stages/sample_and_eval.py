"""`svgpipe sample-and-eval`: a sweep of steps × guidance → latents → decoded images → distances → report.json.

Each phase is a Ray Data pipeline over units with a journal, so an interrupted sweep resumes:

    draw      latents of every setting, into Zarr groups; noise and label of sample i follow (seed, i) alone
    decode    those latents, reconstructions of real images and pure noise, into WebDataset tars
    measure   features of every set, then distances to the reference

Three reference lines make the numbers readable: held-out real images (the floor), reconstructions (what a perfect
diffusion model would get) and decoded noise (the ceiling).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from svgpipe.manifests.cache import FeatureStore, StoreSpec
from svgpipe.manifests.checkpoint import AutoencoderManifest, load_tensors, save_tensors
from svgpipe.manifests.errors import ArtifactError, UsageError
from svgpipe.manifests.evaluation import REPORT_NAME, EvaluationManifest, Measured, Report
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.manifest import WorkDir, digest, file_sha256, require_same
from svgpipe.manifests.recipe import AutoencoderSection, EvaluationSection
from svgpipe.manifests.shards import ShardFile, ShardSet
from svgpipe.models.flow import Guidance
from svgpipe.stages.encoder import build_backbone, load_autoencoder, reconstruct
from svgpipe.stages.eval_tasks import ReadForDecoding, WriteImages, WriteLatents, pass_on
from svgpipe.stages.images import psnr
from svgpipe.stages.measure import (
    Extractor,
    ImageRef,
    ImageSet,
    class_accuracy,
    frechet_distance,
    kernel_distance,
    load_extractor,
    refs_of,
)
from svgpipe.stages.pixels import as_pixels
from svgpipe.stages.progress import Progress, Silent
from svgpipe.stages.sampling import SamplerSettings, draw_latents, initial_noise, labels_of, load_diffusion
from svgpipe.stages.streaming import evenly_spread
from svgpipe.stages.units import Resources, Row, run_units, start_worker

RECONSTRUCTIONS, NOISE = "reconstructions", "decoded-noise"


def sample_and_eval(
    diffusion: Path,
    autoencoder: Path,
    reference: ShardSet,
    out: Path,
    config: EvaluationSection,
    *,
    resources: Resources | None = None,
    progress: Progress | None = None,
) -> EvaluationManifest:
    """Run the sweep and publish it at `out`; run again to resume. Ray must be connected.

    Args:
        diffusion: finished diffusion model. autoencoder: the one whose latents it was trained on.
        reference: shard set; its training split is what distances are measured against.
        out: directory to create or resume.
    Raises:
        MismatchError: the autoencoder is not the one that made the cache, or `out` holds another sweep.
        ArtifactError: missing weights or images. UsageError: a guidance mode that does not exist.
    """
    resources, progress = resources or Resources(), progress or Silent()
    trained = load_diffusion(diffusion, config.weights)
    encoder = AutoencoderManifest.read(autoencoder)
    require_same(
        str(diffusion),
        trained.manifest.inputs["cache"].inputs["autoencoder"],
        encoder,
        autoencoder,
        what_to_do="Sample with the autoencoder that extracted the cache; another one decodes to noise.",
    )
    settings = _settings(config)
    inputs = {
        "diffusion": trained.manifest.as_input(diffusion),
        "autoencoder": encoder.as_input(autoencoder),
        "reference": reference.as_input(),
    }
    work = WorkDir(out, EvaluationManifest, config.model_dump(mode="json"), inputs)
    if work.finished is not None:
        return work.finished
    # Weights that are missing should stop a sweep before it has sampled for hours.
    extractor = load_extractor(
        config.extractor, build_backbone(AutoencoderSection.model_validate(encoder.config).backbone, encoder.image_size)
    )
    sweep = _Sweep(diffusion, autoencoder, out, config, settings, resources, progress)
    sets = _RealSets.of(reference, config, encoder.image_size)
    stores = sweep.draw(trained.manifest.grid, trained.manifest.channels, trained.manifest.class_names)
    images = sweep.decode(stores, sets, trained.channel_mean, trained.channel_std)
    report = _measure(sweep, sets, images, extractor, trained.manifest.class_names, encoder.image_size)
    report.write(out)
    latents = [Journal(out / "journal" / "draw").read(unit) for unit in range(sweep.num_draw_units)]
    tars = {name: [shard.sha256 for shard in shards] for name, shards in images.items()}
    return EvaluationManifest(
        config=work.config,
        inputs=work.inputs,
        seconds=work.seconds,
        num_samples=config.num_samples,
        settings=[setting.name for setting in settings],
        content=digest([[entry["sha256"] for entry in latents], tars]),
        report=file_sha256(out / REPORT_NAME),
    ).publish(out)


def _settings(config: EvaluationSection) -> list[SamplerSettings]:
    try:
        Guidance(1.0, config.guidance_mode)
    except ValueError as error:
        raise UsageError(f"evaluation.guidance_mode: {error}") from error
    return [
        SamplerSettings(
            steps=steps,
            guidance=guidance,
            solver=config.solver,
            guidance_mode=config.guidance_mode,
            time_shift=config.time_shift,
            seed=config.seed,
            precision=config.precision,
            weights=config.weights,
        )
        for guidance in config.guidance
        for steps in config.steps
    ]


@dataclass(frozen=True)
class _RealSets:
    """Real images of the reference: what is measured against, the floor, and what is reconstructed."""

    reference: list[ImageRef]
    heldout: list[ImageRef]
    reconstructed: list[ImageRef]
    size: int
    class_names: list[str]

    @classmethod
    def of(cls, shards: ShardSet, config: EvaluationSection, size: int) -> _RealSets:
        train = refs_of(shards.directory, [s for s in shards.shards if s.split == "train"])
        heldout = refs_of(shards.directory, [s for s in shards.shards if s.split == "heldout"])
        if len(train) < 2:
            raise ArtifactError(f"{shards.directory}: expected at least two reference images, found {len(train)}.")
        reference = [train[i] for i in evenly_spread(len(train), config.reference_images)]
        floor = [heldout[i] for i in evenly_spread(len(heldout), config.num_samples)]
        pool = heldout if len(heldout) >= 2 else train
        reconstructed = [pool[i] for i in evenly_spread(len(pool), config.num_samples)]
        return cls(reference, floor, reconstructed, size, shards.manifest.class_names)


@dataclass(frozen=True)
class _Sweep:
    diffusion: Path
    autoencoder: Path
    out: Path
    config: EvaluationSection
    settings: list[SamplerSettings]
    resources: Resources
    progress: Progress

    @property
    def units_per_set(self) -> int:
        return -(-self.config.num_samples // self.config.unit_rows)

    @property
    def num_draw_units(self) -> int:
        return self.units_per_set * len(self.settings)

    def draw(self, grid: tuple[int, int], channels: int, class_names: Sequence[str]) -> list[FeatureStore]:
        """Latents of every setting, as Zarr groups in the cache's format."""
        config = self.config
        spec = StoreSpec(config.num_samples, ("original",), grid, channels, config.unit_rows, tuple(class_names))
        journal = Journal(self.out / "journal" / "draw")
        stores = []
        trained = load_diffusion(self.diffusion, config.weights)
        for i, setting in enumerate(self.settings):
            path = self.out / "latents" / setting.name
            mine = range(i * self.units_per_set, (i + 1) * self.units_per_set)
            if journal.finished() & set(mine):
                stores.append(FeatureStore(path, spec))
                continue
            store = FeatureStore.create(path, spec, trained.channel_mean, trained.channel_std)
            labels = labels_of(range(config.num_samples), len(class_names)).numpy().astype(np.int32)
            store.put("label", labels)
            store.put("valid", np.ones(config.num_samples, bool))
            store.describe({"sampler": asdict(setting)})
            stores.append(store)
        missing = journal.missing(self.num_draw_units)
        items = [{"unit": unit, "setting": unit // self.units_per_set} for unit in missing]
        total = config.num_samples * len(self.settings)
        self.progress.begin("sample", self.num_draw_units, self.num_draw_units - len(missing))
        args = {
            "diffusion": self.diffusion.resolve(),
            "settings": self.settings,
            "spec": spec,
            "units_per_set": self.units_per_set,
            "batch_size": config.batch_size,
            "threads": self.resources.threads,
        }
        paths = [store.path.resolve() for store in stores]
        writer = WriteLatents(paths, spec, self.units_per_set, journal.directory.resolve())
        for _ in run_units(items, pass_on, _Draw, args, writer, self.resources):
            self.progress.advance(1, f"{total} latents in all")
        return stores

    def decode(
        self,
        stores: Sequence[FeatureStore],
        sets: _RealSets,
        mean: NDArray[np.float32],
        std: NDArray[np.float32],
    ) -> dict[str, list[ShardFile]]:
        """Decoded images of every setting, of real images and of noise, as tars."""
        names = [setting.name for setting in self.settings] + [RECONSTRUCTIONS, NOISE]
        jobs: list[dict[str, Any]] = []
        rows = self.config.unit_rows
        for name, store in zip(names, [*stores, None, None], strict=True):
            count = len(sets.reconstructed) if name == RECONSTRUCTIONS else self.config.num_samples
            for number, first in enumerate(range(0, count, rows)):
                indices = list(range(first, min(first + rows, count)))
                refs = [sets.reconstructed[i] for i in indices] if name == RECONSTRUCTIONS else []
                jobs.append(
                    {
                        "set": name,
                        "number": number,
                        "store": None if store is None else str(store.path.resolve()),
                        "indices": indices,
                        "refs": [[str(r.tar.resolve()), r.offset, r.size, r.sha256, r.label] for r in refs],
                    }
                )
        journal = Journal(self.out / "journal" / "decode")
        missing = journal.missing(len(jobs))
        self.progress.begin("decode", len(jobs), len(jobs) - len(missing))
        for name in names:
            (self.out / "images" / name).mkdir(parents=True, exist_ok=True)
        items = [{"unit": unit, "job": json.dumps(jobs[unit])} for unit in missing]
        args = {
            "autoencoder": self.autoencoder.resolve(),
            "mean": mean,
            "std": std,
            "seed": self.config.seed,
            "batch_size": self.config.batch_size,
            "threads": self.resources.threads,
        }
        writer = WriteImages(self.out.resolve(), journal.directory.resolve())
        for _ in run_units(items, ReadForDecoding(sets.size), _Decode, args, writer, self.resources):
            self.progress.advance()
        found: dict[str, list[ShardFile]] = {name: [] for name in names}
        for unit, job in enumerate(jobs):
            found[job["set"]].append(ShardFile.model_validate(journal.read(unit)["shard"]))
        return found


class _Draw:
    """Actor: a unit of one setting's latents."""

    def __init__(
        self,
        diffusion: Path,
        settings: list[SamplerSettings],
        spec: StoreSpec,
        units_per_set: int,
        batch_size: int,
        threads: int,
    ) -> None:
        self.device = start_worker(threads)
        self.model = load_diffusion(diffusion, settings[0].weights).model.to(self.device)
        self.settings, self.spec, self.units_per_set, self.batch_size = settings, spec, units_per_set, batch_size

    def __call__(self, row: Row) -> Row:
        setting, rows = self.settings[row["setting"]], self.spec.rows_of(int(row["unit"]) % self.units_per_set)
        parts = [
            draw_latents(self.model, rows[i : i + self.batch_size], setting, self.device).cpu()
            for i in range(0, len(rows), self.batch_size)
        ]
        latents = torch.cat(parts).numpy().astype(np.float16)
        if not np.isfinite(latents).all():
            raise ArtifactError(f"{setting.name}: the model drew latents that are not finite; train longer or anew.")
        shape = (len(rows), 1, *self.spec.grid, self.spec.channels)
        return {"unit": row["unit"], "latents": latents.reshape(shape)}


class _Decode:
    """Actor: latents, real images or noise → 8-bit images, rounded before anything measures them."""

    def __init__(
        self,
        autoencoder: Path,
        mean: NDArray[np.float32],
        std: NDArray[np.float32],
        seed: int,
        batch_size: int,
        threads: int,
    ) -> None:
        self.device = start_worker(threads)
        model, manifest = load_autoencoder(autoencoder)
        self.model, self.grid = model.to(self.device), manifest.grid
        self.mean, self.std = torch.from_numpy(mean), torch.from_numpy(std)
        self.seed, self.batch_size = seed, batch_size

    @torch.inference_mode()
    def _decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """(n,row,column,channel) normalised → (n,H,W,3)."""
        features = (latents * self.std + self.mean).permute(0, 3, 1, 2).to(self.device)
        chunks = features.split(self.batch_size)
        return np.concatenate([as_pixels(self.model.decode(chunk)) for chunk in chunks])

    def __call__(self, row: Row) -> Row:
        job = json.loads(row["job"])
        if job["set"] == RECONSTRUCTIONS:
            pixels = reconstruct(self.model, np.array(row["pixels"]), self.batch_size)
        elif job["store"] is None:
            noise = initial_noise(self.seed, job["indices"], self.grid[0] * self.grid[1], len(self.mean))
            pixels = self._decode(noise.reshape(len(noise), *self.grid, -1))
        else:
            pixels = self._decode(torch.from_numpy(np.array(row["latents"])))
        return {"unit": row["unit"], "job": row["job"], "images": pixels}


def _measure(
    sweep: _Sweep,
    sets: _RealSets,
    images: dict[str, list[ShardFile]],
    extractor: Extractor,
    class_names: list[str],
    size: int,
) -> Report:
    progress, out = sweep.progress, sweep.out
    generated = {name: ImageSet(refs_of(out / "images" / name, shards), size) for name, shards in images.items()}
    everything = {"reference": ImageSet(sets.reference, size), **generated}
    not_measured = []
    if len(sets.heldout) >= 2:
        everything["heldout"] = ImageSet(sets.heldout, size)
    else:
        not_measured.append("held-out real images (the floor): the reference has fewer than two; shard with a holdout")
    same_classes = sets.class_names == class_names
    if not same_classes:
        not_measured.append("share of samples nearest to their own class: the reference has other classes")
    progress.begin("measure", len(everything))
    features = {}
    for name, image_set in everything.items():
        features[name] = _features(out / "features", name, image_set, extractor, sweep.config.batch_size)
        progress.advance(1, name)
    reference, labels = features["reference"], everything["reference"].labels

    def measured(name: str, role: Any, **more: Any) -> Measured:
        mean, std = kernel_distance(features[name], reference)
        has_labels = role != NOISE and (same_classes or role != "samples")
        return Measured(
            name=name,
            role=role,
            num_images=len(features[name]),
            frechet_distance=frechet_distance(features[name], reference),
            kernel_distance=mean,
            kernel_distance_std=std,
            class_accuracy=class_accuracy(reference, labels, features[name], everything[name].labels)
            if has_labels
            else None,
            **more,
        )

    results = [measured(s.name, "samples", sampler=asdict(s)) for s in sweep.settings]
    if "heldout" in features:
        results.append(measured("heldout", "heldout"))
    originals = ImageSet(sets.reconstructed, size)
    quality = _mean_psnr(originals, everything[RECONSTRUCTIONS])
    results.append(measured(RECONSTRUCTIONS, "reconstructions", psnr=quality))
    results.append(measured(NOISE, "decoded-noise"))
    return Report(
        metric=extractor.metric,
        extractor=extractor.description,
        reference={"num_images": len(sets.reference), "content": everything["reference"].digest, "split": "train"},
        image_size=size,
        class_names=class_names,
        results=results,
        not_measured=not_measured,
    )


def _features(folder: Path, name: str, images: ImageSet, extractor: Extractor, batch_size: int) -> Tensor:
    """Features of a set, kept by the content of images and extractor, never by name alone."""
    folder.mkdir(exist_ok=True)
    key = digest([images.digest, extractor.description])[:16]
    path = folder / f"{name}-{key}.safetensors"
    if path.exists():
        return load_tensors(path)["features"]
    found = extractor.features(images, batch_size)
    save_tensors(path, {"features": found})
    return found


def _mean_psnr(originals: ImageSet, reconstructions: ImageSet) -> float | None:
    """dB, mean over images; None where every one is reproduced exactly."""
    values = [psnr(originals.pixels(i)[None], reconstructions.pixels(i)[None])[0] for i in range(len(originals))]
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else None
