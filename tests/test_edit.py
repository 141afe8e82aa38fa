"""`svgpipe edit`: a part of an image is made anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from svgpipe.models.dit import DiT
from svgpipe.models.editing import invert, repaint, soft_mask
from svgpipe.models.guidance import Guidance, GuidedVelocity
from svgpipe.models.sampler import sample, time_grid
from svgpipe.stages.images.decode import RGBArray, centre_crop, to_array
from svgpipe.stages.images.stream import load_images
from svgpipe.stages.networks.sampling import SamplerSettings
from svgpipe.stages.sample import edit
from svgpipe.stages.sample.edit import ImageEditor, read_image

from .conftest import Finished, Outcome

SIZE = 32


def towards_label(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return (y.view(-1, 1, 1) - z) * (1 - t.view(-1, 1, 1) / 2)


def test_inversion_of_a_straight_path_is_exact() -> None:
    z1, v = torch.randn(1, 4, 3), torch.randn(1, 4, 3)
    times = [0.2, 0.5, 0.9, 1.0]
    path = invert(lambda z, t, y: v, z1, torch.tensor([0]), times)
    for t, z in zip(times, path, strict=True):
        torch.testing.assert_close(z, z1 - (1 - t) * v)


def test_the_mask_decides_what_is_kept_and_what_is_sampled() -> None:
    times = time_grid(12, 0.4).tolist()
    z1, noise, labels = torch.randn(1, 4, 3), torch.randn(5, 4, 3), torch.full((5,), 2)
    path = invert(towards_label, z1, torch.tensor([1]), times)
    v_at, guidance = GuidedVelocity(towards_label, null_label=9), Guidance(4.0)
    mask = torch.tensor([0.0, 1.0, 0.0, 1.0])[:, None]
    edited = repaint(v_at, path, mask, noise, labels, times, guidance)
    sampled = sample(towards_label, noise, labels, null_label=9, steps=12, shift=0.4, guidance=guidance)
    torch.testing.assert_close(edited[:, [0, 2]], z1[:, [0, 2]].expand(5, -1, -1))
    torch.testing.assert_close(edited[:, [1, 3]], sampled[:, [1, 3]])


def test_noise_has_the_deviation_of_the_states_where_the_edit_begins() -> None:
    noise, path = torch.ones(1, 1, 1), [torch.zeros(1, 1, 1), torch.zeros(1, 1, 1)]
    still = GuidedVelocity(lambda z, t, y: torch.zeros_like(z), null_label=9)
    edited = repaint(still, path, torch.ones(1, 1), noise, torch.tensor([0]), [0.6, 1.0], Guidance())
    assert edited.item() == pytest.approx((0.6**2 + 0.4**2) ** 0.5)


@pytest.mark.parametrize("steps", [4, 100])
def test_the_mask_blends_independently_of_the_number_of_steps(steps: int) -> None:
    times = time_grid(steps, 0.4).tolist()
    still = [torch.zeros(1, 3, 1)] * (steps + 1)
    v_at = GuidedVelocity(lambda z, t, y: torch.zeros_like(z), null_label=9)
    mask = torch.tensor([0.0, 0.25, 1.0])[:, None]
    edited = repaint(v_at, still, mask, torch.ones(1, 3, 1), torch.tensor([0]), times, Guidance())
    torch.testing.assert_close(edited[0], mask)


@given(st.integers(0, 31), st.integers(0, 31), st.integers(1, 32), st.integers(1, 32))
def test_the_mask_is_whole_on_cells_of_the_box_and_ends_one_cell_around_them(
    x: int, y: int, width: int, height: int
) -> None:
    width, height = min(width, SIZE - x), min(height, SIZE - y)
    mask = soft_mask((x, y, width, height), SIZE, (8, 8)).view(8, 8)
    columns, rows = (range(at // 4, (at + length - 1) // 4 + 1) for at, length in ((x, width), (y, height)))
    for row in range(8):
        for column in range(8):
            apart = max(rows[0] - row, row - rows[-1], columns[0] - column, column - columns[-1])
            if apart <= 0:
                assert mask[row, column] == 1
            elif apart == 1:
                assert 0 < mask[row, column] <= 0.5
            else:
                assert mask[row, column] == 0


@pytest.fixture(scope="session")
def photograph(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "wide.png"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_an_edit_writes_a_page_and_pictures(
    finished: Finished, photograph: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    out = tmp_path / "edit"
    asked = ["edit", finished.root / "diffusion", photograph, "--box", "0,8,16,16", "--class", "cat", "--steps", "3"]
    ran = svgpipe(*asked, "--out", out, "--count", "2", "--source-class", "0", "--t-edit", "0.5", "--seed", "7")
    assert ran.code == 0 and "edit: 6/6 steps" in ran.err, ran.err
    pictures = {path.stem: np.asarray(Image.open(path)).astype(float) for path in out.glob("*.png")}
    assert sorted(pictures) == ["mask", "reconstruction", "result-0", "result-1", "source"]
    assert all(pixels.shape == (SIZE, SIZE, 3) for pixels in pictures.values())
    outside = np.ones((SIZE, SIZE), bool)
    outside[8:24, :16] = False
    page = (out / "edit.html").read_text()
    for name in ("reconstruction", "result-0", "result-1"):
        error = ((pictures[name] - pictures["source"])[outside] ** 2).mean()
        assert f"{name.replace('-', ' ')}, {10 * np.log10(255**2 / error):.2f} dB" in page, name
    editor = ImageEditor(finished.root / "diffusion")
    settings = editor.sampler.settings("evaluation.time_shift=0.4", steps=3, guidance=4.0, seed=7)
    square = pictures["source"].astype(np.uint8)
    expected = editor.edit(square, (0, 8, 16, 16), 1, settings, source_label=0, t_edit=0.5, count=2)
    for number, pixels in enumerate(expected.results):
        np.testing.assert_array_equal(pictures[f"result-{number}"], pixels)
    assert "back to time 0.5" in page
    assert "made anew as cat" in page
    assert "as astronaut" in page
    assert (pictures["result-0"] != pictures["result-1"]).any()
    assert ", ".join(f"{value:.2f}" for value in expected.outside) in ran.out


def test_every_option_changes_the_edit(finished: Finished, photograph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = ImageEditor(finished.root / "diffusion")
    pixels = to_array(centre_crop(read_image(photograph), SIZE))
    settings = editor.sampler.settings(steps=4, guidance=100.0)  # the tiny model hardly knows its classes

    def result(settings: SamplerSettings = settings, **options: Any) -> RGBArray:
        return editor.edit(pixels, (0, 8, 16, 16), options.pop("label", 1), settings, **options).results

    plain = result()
    np.testing.assert_array_equal(plain, result())
    np.testing.assert_array_equal(plain[0], result(count=3)[0])
    changed = {
        "class": result(label=2),
        "time": result(t_edit=0.5),
        "seed": result(editor.sampler.settings(steps=4, guidance=100.0, seed=1)),
        "guidance": result(editor.sampler.settings(steps=4, guidance=50.0)),
    }
    assert [name for name, images in changed.items() if (images == plain).all()] == []
    # The path changes too little to be seen with the tiny model.
    inverted: list[int] = []

    def seen(model: DiT, z: Tensor, y: Tensor, *times: Any) -> list[Tensor]:
        inverted.append(int(y))
        return invert(model, z, y, *times)

    monkeypatch.setattr(edit, "invert", seen)
    result()
    result(source_label=2)
    assert inverted == [3, 2]  # 3: no class


def test_an_image_is_encoded_as_in_the_cache(finished: Finished) -> None:
    editor, cache = ImageEditor(finished.root / "diffusion"), finished.cache
    pixels = load_images(finished.shards, [3], SIZE)[0]
    expected = torch.from_numpy(cache.read([3]).astype(np.float32)).flatten(1, 2)
    torch.testing.assert_close(editor.encode(pixels), expected, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("kind", ["kl", "aligned-kl"])
def test_latents_of_a_posterior_are_edited(
    vaes: Path, photograph: Path, tmp_path: Path, svgpipe: Callable[..., Outcome], kind: str
) -> None:
    asked = ["--box", "0,8,16,16", "--class", "1", "--steps", "2", "--count", "1"]
    ran = svgpipe("edit", vaes / kind / "diffusion", photograph, *asked, "--out", tmp_path / "edit")
    assert ran.code == 0, ran.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--box", "20,0,16,8"], ["--box 20,0,16,8", "32 x 32"]),
        (["--box", "0,0,0,8"], ["--box"]),
        (["--box", "0,0,32,32"], ["svgpipe sample"]),
        (["--box", "0,0,8"], ["--box 0,0,8", "x,y,width,height"]),
        (["--class", "catt"], ["'catt'", "Nearest: cat"]),
        (["--source-class", "catt"], ["'catt'"]),
        (["--set", "evaluation.solver=heun"], ["euler", "heun"]),
        (["--class", ""], ["''"]),
        (["--source-class", ""], ["''"]),
        (["--out", "file"], ["already there"]),
    ],
)
def test_bad_input_is_named(
    finished: Finished,
    photograph: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    svgpipe: Callable[..., Outcome],
    options: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    defaults = {"--box": "0,0,8,8", "--class": "cat", "--out": "new"}
    asked = [part for name, value in defaults.items() if name not in options for part in (name, value)]
    found = svgpipe("edit", finished.root / "diffusion", photograph, *asked, *options)
    assert found.code == 2, found.err
    for word in words:
        assert word in found.err, found.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_that_is_no_image_is_named(finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    (tmp_path / "a.png").write_text("no image")
    asked = ["--box", "0,0,8,8", "--class", "cat", "--out", tmp_path / "new"]
    for name in ("a.png", "missing.png"):
        found = svgpipe("edit", finished.root / "diffusion", tmp_path / name, *asked)
        assert found.code == 2
        assert name in found.err
