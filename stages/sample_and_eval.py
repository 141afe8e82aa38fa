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
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from svgpipe.manifests.checkpoint import AutoencoderManifest
from svgpipe.manifests.errors import ArtifactError, UsageError
from svgpipe.manifests.evaluation import REPORT_NAME, EvaluationManifest
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.manifest import WorkDir, digest, require_same
from svgpipe.manifests.recipe import AutoencoderSection, EvaluationSection
from svgpipe.manifests.shards import ShardFile, ShardSet
from svgpipe.manifests.storage import Location, absolute, file_sha256, make_directory
from svgpipe.manifests.store import FeatureStore
from svgpipe.manifests.store_spec import StoreSpec
from svgpipe.models.flow import Guidance
from svgpipe.stages.comparison import NOISE, RECONSTRUCTIONS, RealSets, compare
from svgpipe.stages.encoder import build_backbone, load_autoencoder, reconstruct
from svgpipe.stages.eval_tasks import ReadForDecoding, WriteImages, WriteLatents, pass_on
from svgpipe.stages.measure import (
    load_extractor,
)
from svgpipe.stages.pixels import as_pixels
from svgpipe.stages.progress import Progress, Recorded
from svgpipe.stages.sampling import (
    SamplerSettings,
    TrainedDiffusion,
    draw_latents,
    initial_noise,
    labels_of,
    load_diffusion,
)
from svgpipe.stages.units import Resources, Row, run_units, start_worker


def sample_and_eval(
    diffusion: Location,
    autoencoder: Location,
    reference: ShardSet,
    out: Location,
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
    resources = resources or Resources()
    trained = load_diffusion(diffusion, config.weights)
    encoder = AutoencoderManifest.read(autoencoder)
    require_same(
        str(diffusion),
        trained.manifest.inputs["cache"].inputs["autoencoder"],
        encoder.as_input(autoencoder),
        what_to_do="Sample with the autoencoder that extracted the cache; another one decodes to noise.",
    )
    settings = _settings(config)
    inputs = {
        "diffusion": trained.manifest.as_input(diffusion),
        "autoencoder": encoder.as_input(autoencoder),
        "reference": reference.as_input(),
    }
    with WorkDir(out, EvaluationManifest, config.model_dump(mode="json"), inputs) as work:
        if work.finished is not None:
            return work.finished
        # Weights that are missing should stop a sweep before it has sampled for hours.
        extractor = load_extractor(
            config.extractor,
            build_backbone(AutoencoderSection.model_validate(encoder.config).backbone, encoder.image_size),
        )
        progress = Recorded(progress, out)
        sweep = _Sweep(diffusion, autoencoder, out, config, settings, resources, progress)
        sets = RealSets.of(reference, config, encoder.image_size)
        stores = sweep.draw(trained)
        images = sweep.decode(stores, sets, trained.channel_mean, trained.channel_std)
        report = compare(
            out,
            sets,
            images,
            settings,
            trained.manifest.class_names,
            extractor,
            batch_size=config.batch_size,
            progress=progress,
        )
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
class _Sweep:
    diffusion: Location
    autoencoder: Location
    out: Location
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

    def draw(self, trained: TrainedDiffusion) -> list[FeatureStore]:
        """Latents of every setting, as Zarr groups in the cache's format."""
        config = self.config
        grid, channels, class_names = trained.manifest.grid, trained.manifest.channels, trained.manifest.class_names
        spec = StoreSpec(config.num_samples, ("original",), grid, channels, config.unit_rows, tuple(class_names))
        journal = Journal(self.out / "journal" / "draw")
        stores = []
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
            "diffusion": absolute(self.diffusion),
            "settings": self.settings,
            "spec": spec,
            "units_per_set": self.units_per_set,
            "batch_size": config.batch_size,
            "threads": self.resources.threads,
        }
        paths = [absolute(store.path) for store in stores]
        writer = WriteLatents(paths, spec, self.units_per_set, absolute(journal.directory))
        for _ in run_units(items, pass_on, _Draw, args, writer, self.resources):
            self.progress.advance(1, f"{total} latents in all")
        return stores

    def decode(
        self,
        stores: Sequence[FeatureStore],
        sets: RealSets,
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
                        "store": None if store is None else str(absolute(store.path)),
                        "indices": indices,
                        "refs": [[str(absolute(r.tar)), r.offset, r.size, r.sha256, r.label] for r in refs],
                    }
                )
        journal = Journal(self.out / "journal" / "decode")
        missing = journal.missing(len(jobs))
        self.progress.begin("decode", len(jobs), len(jobs) - len(missing))
        for name in names:
            make_directory(self.out / "images" / name)
        items = [{"unit": unit, "job": json.dumps(jobs[unit])} for unit in missing]
        args = {
            "autoencoder": absolute(self.autoencoder),
            "mean": mean,
            "std": std,
            "seed": self.config.seed,
            "batch_size": self.config.batch_size,
            "threads": self.resources.threads,
        }
        writer = WriteImages(absolute(self.out), absolute(journal.directory))
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
        diffusion: Location,
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
        autoencoder: Location,
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
