"""`svgpipe sample`: images of given classes from a finished model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from svgpipe.manifests.errors import UsageError
from svgpipe.stages.networks.autoencoder import decode_latents, load_autoencoder
from svgpipe.stages.networks.diffusion import open_diffusion
from svgpipe.stages.networks.sampling import initial_noise
from svgpipe.stages.runtime.progress import Silent
from svgpipe.stages.sample import load
from svgpipe.stages.sample.classes import class_number, labels_in_order
from svgpipe.stages.sample.interpolation import between_classes, between_seeds, slerp
from svgpipe.stages.sample.trajectory import trajectory

from .conftest import Finished, Outcome

SIZE = 32


def test_an_image_depends_on_its_class_and_its_number_alone(finished: Finished) -> None:
    sampler = load(finished.root / "diffusion")
    mixed = sampler.sample(["coffee", "cat", "coffee", 1, 1], steps=2, seed=3)
    alone = sampler.sample(["cat"] * 3, steps=2, seed=3)
    assert mixed.shape == (5, SIZE, SIZE, 3)
    assert mixed.dtype == np.uint8
    assert sampler.class_names.index("cat") == 1
    np.testing.assert_array_equal(mixed[[1, 3, 4]], alone)
    assert (alone[0] != alone[1]).any()
    assert (sampler.sample(["cat"], steps=2, seed=4) != alone[:1]).any()
    assert sampler.sample([]).size == 0


def test_latents_are_decoded_as_the_autoencoder_encoded_them(finished: Finished) -> None:
    rows = finished.cache.read([0, 5]).astype(np.float32)
    autoencoder, _ = load_autoencoder(finished.root / "autoencoder")
    expected = decode_latents(autoencoder, torch.from_numpy(finished.cache.denormalize(rows)))
    decoded = load(finished.root / "diffusion").decode(torch.from_numpy(rows).flatten(1, 2))
    assert np.abs(decoded.astype(int) - expected).max() <= 1


def test_every_setting_reaches_the_sampler(finished: Finished) -> None:
    sampler = load(finished.root / "diffusion")
    own = sampler.settings()
    trained = sampler.trained.section
    assert (own.steps, own.time_shift, own.weights) == (trained.sample_steps, trained.sample_shift, "ema-0.9")
    plain = sampler.sample(["cat"], steps=3)
    changes = ("evaluation.solver=heun", "evaluation.time_shift=1")
    for other in (
        sampler.sample(["cat"], steps=4),
        sampler.sample(["cat"], steps=3, guidance=4.0),
        *(sampler.sample(["cat"], steps=3, overrides=[change]) for change in changes),
        load(finished.root / "diffusion", weights="raw").sample(["cat"], steps=3),
    ):
        assert (other != plain).any()
    for wrong in ("evaluation.steps=3", "evaluation.preset=sit-sde", "evaluation={}", "diffusion.steps=3"):
        with pytest.raises(UsageError, match="time_shift"):
            sampler.sample(["cat"], overrides=[wrong])


def test_a_sheet_an_archive_and_files_hold_the_same_images(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    asked = ["sample", finished.root / "diffusion", "--classes", "cat,0", "--count", "5", "--steps", "2"]
    for out in ("sheet.png", "all.npz", "files"):
        ran = svgpipe(*asked, "--out", tmp_path / "new" / out)
        assert ran.code == 0, ran.err
    assert "images: 5, classes: 2" in ran.out
    before = (tmp_path / "new" / "sheet.png").read_bytes()
    again = svgpipe(*asked, "--seed", "1", "--out", tmp_path / "new" / "sheet.png")
    assert again.code == 2
    assert "already there" in again.err
    assert (tmp_path / "new" / "sheet.png").read_bytes() == before
    with np.load(tmp_path / "new" / "all.npz") as archive:
        images, labels = archive["arr_0"], archive["arr_1"]
    assert labels.tolist() == [1, 1, 1, 0, 0]
    expected = load(finished.root / "diffusion").sample(labels.tolist(), steps=2)
    np.testing.assert_array_equal(images, expected)
    files = sorted((tmp_path / "new" / "files").iterdir())
    assert [file.name for file in files[2:4]] == ["00002_cat.png", "00003_astronaut.png"]
    for file, pixels in zip(files, images, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(file)), pixels)
    sheet = np.asarray(Image.open(tmp_path / "new" / "sheet.png"))
    large = images[1].repeat(3, axis=0).repeat(3, axis=1)
    places = np.lib.stride_tricks.sliding_window_view(sheet, large.shape)[:, :, 0]
    assert (places == large).all(axis=(2, 3, 4)).sum() == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--classes", "catt"], ["'catt'", "Nearest: cat"]),
        (["--classes", "3"], ["'3'", "0 to 2"]),
        (["--out", "a.jpg"], ["NAME.png", "NAME.npz", "folder"]),
        (["--classes", ","], ["''"]),
        (["--classes", "cat,coffee", "--count", "1"], ["--count 1", "2 classes"]),
        (["--out", "file/a.png"], ["file", "not a folder"]),
        (["--out", "file"], ["already there"]),
        (["--set", "evaluation.stepz=3"], ["evaluation.stepz", "solver"]),
        (["--set", "evaluation.time_shift=fast"], ["evaluation.time_shift", "number"]),
        (["--set", "evaluation.solver=ddim"], ["evaluation.solver", "objective flow"]),
        (["--set", "evaluation.internal_guidance=true"], ["auxiliary head"]),
        (["--ema", "0.7"], ["0.7", "ema-0.9"]),
        (["--count", "0"], ["--count"]),
        (["--show-steps", "--out", "a.npz"], ["--show-steps", "NAME.png"]),
        (["--show-steps", "--set", "evaluation.solver=dopri5"], ["--show-steps", "dopri5"]),
        (["--show-steps", "--count", "65"], ["--count", "64"]),
        (["--interpolate", "", "cat"], ["''"]),
        (["--interpolate", "cat", "dog"], ["'dog'", "0 to 2"]),
        (["--interpolate", "1", "cat", "--classes", "cat"], ["two seeds"]),
        (["--interpolate", "0", "1", "--count", "3"], ["--count", "--frames"]),
    ],
)
def test_bad_input_is_named(
    finished: Finished,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    svgpipe: Callable[..., Outcome],
    options: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    found = svgpipe(
        "sample", finished.root / "diffusion", *([] if "--out" in options else ["--out", "a.png"]), *options
    )
    assert found.code == 2, found.err
    for word in words:
        assert word in found.err, found.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_autoencoder_is_found_or_given(
    finished: Finished, vaes: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    for name in ("diffusion", "cache", "autoencoder"):
        shutil.copytree(finished.root / name, tmp_path / "moved" / name)
    model = tmp_path / "moved" / "diffusion"
    shutil.rmtree(tmp_path / "moved" / "cache" / "features")  # nothing is read but where the autoencoder is
    asked = ["--steps", "1", "--count", "2", "--out", tmp_path / "a.png"]
    assert svgpipe("sample", model, *asked[:-1], tmp_path / "moved.png").code == 0
    checkpoint = next((finished.root / "diffusion" / "checkpoints").glob("step-*"))
    unknown = svgpipe("sample", checkpoint, *asked)
    assert unknown.code == 2
    assert "--autoencoder" in unknown.err
    assert svgpipe("sample", checkpoint, "--autoencoder", finished.root / "autoencoder", *asked).code == 0
    other = svgpipe("sample", model, "--autoencoder", vaes / "kl" / "autoencoder", *asked[:-1], tmp_path / "b.png")
    assert other.code == 1
    assert "--autoencoder" in other.err


@pytest.mark.parametrize("solver", ["euler", "heun", "multistep", "sde"])
def test_a_trajectory_leads_from_noise_to_the_samples(finished: Finished, solver: str) -> None:
    sampler = load(finished.root / "diffusion")
    settings = sampler.settings(f"evaluation.solver={solver}", steps=3, seed=5)
    labels = [1] * 17 + [0]  # two batches
    states = trajectory(sampler, labels, settings)
    assert states.shape == (4, 18, SIZE, SIZE, 3)
    noise = torch.cat([initial_noise(5, range(17), 16, 116), initial_noise(5, [0], 16, 116)])
    np.testing.assert_array_equal(states[0], sampler.decode(noise))
    np.testing.assert_array_equal(states[-1], sampler.images(labels, settings))


def test_interpolations_end_in_samples(finished: Finished) -> None:
    sampler, shares = load(finished.root / "diffusion"), [0.0, 0.5, 1.0]
    settings = sampler.settings(steps=2, seed=3)
    ends = [sampler.sample([1], steps=2, seed=seed)[0] for seed in (3, 8)]
    for images in between_seeds(sampler, 1, (3, 8), shares, settings, Silent()):
        assert np.abs(images[[0, 2]].astype(int) - ends).max() <= 1
        assert all((images[1] != end).any() for end in ends)
    first = sampler.images([0, 2], settings)
    images = between_classes(sampler, (0, 2), shares, settings, Silent())
    assert np.abs(images[[0, 2]].astype(int) - first).max() <= 1
    assert all((images[1] != end).any() for end in first)
    assert len(sampler.model(settings).y_embedder.embedding_table.weight) == 4  # its own labels again
    guided = sampler.settings(steps=2, seed=3, guidance=3.0)
    moved = between_classes(sampler, (0, 2), shares, guided, Silent())[[0, 2]]
    assert np.abs(moved.astype(int) - sampler.images([0, 2], guided)).max() <= 1


@given(st.floats(0, 1), st.integers(0, 5))
def test_slerp_keeps_the_norm_of_noise(share: float, seed: int) -> None:
    first, second = initial_noise(seed, [0, 1], 16, 8)
    first, second = first / first.norm(), second / second.norm()
    by = torch.tensor([0.0, share, 1.0])
    points = slerp(first, second, by)
    torch.testing.assert_close(points.flatten(1).norm(dim=1), torch.ones(3))
    torch.testing.assert_close(points[[0, 2]], torch.stack([first, second]))
    torch.testing.assert_close(slerp(first, first, by), first.expand(3, -1, -1))
    angle = torch.arccos((first * second).sum())
    torch.testing.assert_close(torch.arccos((first * points[1]).sum().clamp(-1, 1)), share * angle, atol=1e-3, rtol=0)


def test_steps_and_interpolations_are_drawn(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    asked = ["sample", finished.root / "diffusion", "--steps", "3", "--out", tmp_path / "a.png"]
    shown = svgpipe(*asked, "--count", "4", "--show-steps")
    assert shown.code == 0 and "sample and decode: 8/8 states" in shown.err  # noise and three steps
    cell = (96 + 4, 96 + 18 + 2)
    drawn = {"a.png": (4, 1, 1), "a.steps.png": (4, 4, 1), "a.steps.webp": (4, 1, 4)}
    between = svgpipe(*asked[:-1], tmp_path / "b.png", "--classes", "cat", "--interpolate", "1", "2")
    assert between.code == 0 and "sample: 32/32 images" in between.err
    assert svgpipe(*asked[:-1], tmp_path / "c.png", "--interpolate", "cat", "0", "--frames", "3").code == 0
    drawn |= {"b.png": (16, 2, 1), "b.webp": (2, 1, 16), "c.png": (3, 1, 1), "c.webp": (1, 1, 3)}
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(drawn)
    for name, (columns, rows, frames) in drawn.items():
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (columns * cell[0], rows * cell[1]), name
            least = 2 if name == "a.steps.webp" else 1  # WebP merges frames that hardly differ
            assert least <= getattr(picture, "n_frames", 1) <= frames, name


def test_classes_are_found_by_name_and_by_number(finished: Finished) -> None:
    trained = open_diffusion(finished.root / "diffusion")
    model = replace(trained, class_names=["n02012849", "n01443537", "1", "n03126707"], untrained_classes=())
    shown = ["n02012849 crane", "n01443537 goldfish", "1", "n03126707 crane"]
    for wanted, expected in (("goldfish", 1), ("GOLDFISH", 1), ("n01443537", 1), ("0", 0), ("1", 2), (1, 1), (3, 3)):
        assert class_number(wanted, model, shown) == expected, wanted
    with pytest.raises(UsageError, match="several classes have this name: n02012849, n03126707"):
        class_number("crane", model, shown)
    with pytest.raises(UsageError, match="Nearest: goldfish"):
        class_number("goldfisch", model, shown)
    for wrong in (4, -1, "", "4"):
        with pytest.raises(UsageError, match="0 to 3"):
            class_number(wrong, model, shown)
    with pytest.raises(UsageError, match="without an image"):
        class_number(1, replace(model, untrained_classes=(1,)), shown)


@given(st.integers(1, 60), st.lists(st.integers(0, 99), min_size=1, max_size=20, unique=True))
def test_classes_share_the_images(count: int, classes: list[int]) -> None:
    labels = labels_in_order(classes, count)
    numbers = [labels.count(label) for label in classes]
    assert len(labels) == count == sum(numbers)
    assert max(numbers) - min(numbers) <= 1
    assert [label for label in classes if label in labels] == list(dict.fromkeys(labels))
