"""Features and latents that other programs computed: `FeatureCache.create` and `svgpipe import-latents`."""

from __future__ import annotations

import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file

from svgpipe.manifests import FeatureCache
from svgpipe.manifests.cache_writer import write_unit
from svgpipe.manifests.errors import ArtifactError, SvgpipeError, UsageError
from svgpipe.manifests.model_manifests import DiffusionManifest
from svgpipe.stages.import_latents import stage as module
from svgpipe.stages.import_latents.stage import Import, import_latents
from svgpipe.stages.networks.diffusion import open_diffusion
from svgpipe.stages.train_diffusion.loss import draws_at

from .conftest import Finished, Outcome, tree_bytes

Run = Callable[..., Outcome]
FORMS = ("lightningdit", "repa", "edm2", "mar")
ROWS, GRID, CHANNELS = 300, 4, 3
SYNSETS = ["n01440764", "n01443537", "n01484850"]


class Latents:
    """Means (n,C,H,W) of crops of photographs, their flips, standard deviations and labels."""

    def __init__(self, photographs: Path, offset: float = 0.0) -> None:
        files = sorted(photographs.rglob("*.png"))
        pixels = [np.asarray(Image.open(file).convert("RGB").resize((GRID, GRID)), np.float32) for file in files]
        values = np.stack([pixels[i % len(pixels)] * (1 + i / ROWS) for i in range(ROWS)]) / 64 - 2 + offset
        self.mean = torch.from_numpy(values).permute(0, 3, 1, 2).contiguous()
        self.flip = self.mean.flip(-1).contiguous()
        self.std = 0.6 + self.mean.abs() / 50
        self.labels = torch.arange(ROWS) % 3

    def expected(self, form: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return the features (n, view, row, column, channel) and labels in the order of the cache."""
        views = [self.mean, self.flip] if form in ("lightningdit", "mar") else [self.mean]
        if form != "lightningdit":
            deviations = [self.std, self.std.flip(-1)]
            views = [torch.cat(pair, 1) for pair in zip(views, deviations, strict=False)]
        order = np.argsort(self.labels.numpy(), kind="stable") if form == "mar" else np.arange(ROWS)
        return torch.stack(views, 1).movedim(2, -1).numpy()[order], self.labels.numpy()[order]

    def write(self, form: str, folder: Path) -> Path:
        """Write the files of one program."""
        folder.mkdir(parents=True)
        return {"lightningdit": self._lightningdit, "mar": self._mar, "repa": self._npy, "edm2": self._zip}[form](
            folder
        )

    def _lightningdit(self, folder: Path) -> Path:
        for number, start in enumerate(range(0, ROWS, 130)):
            part = slice(start, start + 130)
            tensors = {"latents": self.mean, "latents_flip": self.flip, "labels": self.labels}
            path = folder / f"latents_rank00_shard{number:03d}.safetensors"
            save_file({name: values[part].clone() for name, values in tensors.items()}, path)
        return folder

    def _members(self) -> Iterator[tuple[str, bytes]]:
        listed = []
        for i in range(ROWS):
            name, content = f"{i // 100:05d}/img-mean-std-{i:08d}.npy", io.BytesIO()
            np.save(content, torch.cat([self.mean[i], self.std[i]]).numpy())
            listed.append([name, int(self.labels[i])])
            yield name, content.getvalue()
        yield "dataset.json", json.dumps({"labels": listed}).encode()

    def _npy(self, folder: Path) -> Path:
        for name, content in self._members():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
        return folder

    def _zip(self, folder: Path) -> Path:
        with zipfile.ZipFile(folder / "img512-sd.zip", "w") as archive:
            for name, content in self._members():
                archive.writestr(name, content)
        return folder / "img512-sd.zip"

    def _mar(self, folder: Path) -> Path:
        for i in range(ROWS):
            path = folder / SYNSETS[int(self.labels[i])] / f"n_{i:04d}.JPEG.npz"
            path.parent.mkdir(exist_ok=True)
            moments, flipped = (
                torch.cat([mean[i], 2 * std[i].log()]).numpy()
                for mean, std in ((self.mean, self.std), (self.flip, self.std.flip(-1)))
            )
            np.savez(path, moments=moments, moments_flip=flipped)
        return folder


@pytest.fixture(scope="module")
def latents(photographs: Path) -> Latents:
    return Latents(photographs)


@pytest.fixture(scope="module")
def sources(latents: Latents, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("latents")
    return {form: latents.write(form, folder / form) for form in FORMS}


@pytest.mark.parametrize("form", FORMS)
def test_latents_of_every_program_become_a_cache(
    form: str, latents: Latents, sources: dict[str, Path], tmp_path: Path, svgpipe: Run
) -> None:
    out = tmp_path / "cache"
    assert "300 samples = 300 valid + 0 rejected" in svgpipe("import-latents", sources[form], "--out", out).out
    cache, (features, labels) = FeatureCache(out), latents.expected(form)
    for number, view in enumerate(cache.views):
        read = cache.denormalize(cache.read(range(ROWS), view))
        np.testing.assert_allclose(read, features[:, number], atol=2e-3)
    np.testing.assert_array_equal(cache.labels, labels)
    assert cache.views == (["original", "flip"] if features.shape[1] == 2 else ["original"])
    assert cache.classes == (SYNSETS if form == "mar" else ["0", "1", "2"])
    assert cache.manifest.latent_shape == (GRID, GRID, CHANNELS)
    assert "whole" in svgpipe("verify", out, "--deep").out


def test_measured_normalisation_is_that_of_drawn_latents(
    latents: Latents, sources: dict[str, Path], tmp_path: Path
) -> None:
    import_latents(Import(sources["repa"]), tmp_path / "cache", processes=1)
    cache = FeatureCache(tmp_path / "cache")
    drawn = latents.mean + latents.std * torch.randn(
        400, *latents.mean.shape, generator=torch.Generator().manual_seed(0)
    )
    mean, std = drawn.mean((0, 1, 3, 4)), drawn.std((0, 1, 3, 4))
    np.testing.assert_allclose(cache.channel_mean[:CHANNELS], mean, atol=0.02)
    np.testing.assert_allclose(cache.channel_std[:CHANNELS], std, rtol=0.02)
    np.testing.assert_array_equal(cache.channel_std[CHANNELS:], cache.channel_std[:CHANNELS])


def test_statistics_beside_the_latents_are_used_and_a_factor_wins(
    latents: Latents, sources: dict[str, Path], tmp_path: Path
) -> None:
    source = latents.write("lightningdit", tmp_path / "source")
    stats = {"mean": torch.full((1, CHANNELS, 1, 1), 0.5), "std": torch.full((1, CHANNELS, 1, 1), 2.0)}
    torch.save(stats, source / "latents_stats.pt")
    import_latents(Import(source), tmp_path / "given", processes=1)
    given = FeatureCache(tmp_path / "given")
    np.testing.assert_array_equal([given.channel_mean, given.channel_std], [[0.5] * CHANNELS, [2.0] * CHANNELS])
    import_latents(Import(source, factor=0.25), tmp_path / "factor", processes=1)
    first = FeatureCache(tmp_path / "factor").read([0])
    np.testing.assert_allclose(first, 0.25 * latents.expected("lightningdit")[0][:1, 0], atol=1e-3)


def test_training_draws_latents_from_the_posterior(latents: Latents) -> None:
    mean, std = (values[:2].flatten(2).mT for values in (latents.mean, latents.std))
    stored, device = torch.cat([mean, std], -1), torch.device("cpu")

    def draw(step: int, *positions: int) -> torch.Tensor:
        return draws_at(0, step, positions, GRID**2, CHANNELS, device, posterior=True).latents(stored)

    assert torch.equal(draw(3, 0, 1), draw(3, 0, 1))
    assert torch.equal(draw(3, 0, 1)[1], draw(3, 5, 1)[1])  # company does not matter
    assert not torch.equal(draw(3, 0, 1), draw(4, 0, 1))
    drawn = torch.stack([draw(step, 0, 1) for step in range(2000)])
    assert torch.allclose(drawn.mean(0), mean, atol=0.08)
    assert torch.allclose(drawn.std(0), std, rtol=0.1)
    noise = draws_at(0, 3, [0, 1], GRID**2, CHANNELS, device, posterior=True)
    assert noise.posterior is not None and not torch.equal(noise.noise, noise.posterior)
    assert torch.equal(noise.noise, draws_at(0, 3, [0, 1], GRID**2, CHANNELS, device).noise)


@pytest.fixture(scope="module")
def trained(
    sources: dict[str, Path], photographs: Path, tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A posterior cache with held-out rows, and a model trained on it."""
    from svgpipe.manifests.recipe_loader import load_recipe
    from svgpipe.stages.train_diffusion.stage import train_diffusion

    folder = tmp_path_factory.mktemp("trained")
    heldout = Latents(photographs, offset=0.02).write("mar", folder / "heldout")
    import_latents(Import(sources["mar"], heldout, encoder="sd-vae-ft-mse"), folder / "cache", processes=1)
    config = load_recipe(str(tiny_recipe), ["diffusion.quality_samples=16"]).diffusion
    train_diffusion(FeatureCache(folder / "cache"), folder / "diffusion", config)
    return folder


def test_a_model_trains_on_a_posterior_cache(trained: Path) -> None:
    model, cache = DiffusionManifest.read(trained / "diffusion"), FeatureCache(trained / "cache")
    assert model.channels == CHANNELS
    assert model.heldout_loss is not None
    mean, std = open_diffusion(trained / "diffusion").statistics()
    np.testing.assert_array_equal(mean, cache.channel_mean[:CHANNELS])
    np.testing.assert_array_equal(std, cache.channel_std[:CHANNELS])
    assert cache.manifest.num_heldout == ROWS
    one, two = (cache.denormalize(cache.read_latents(rows)) for rows in (range(ROWS), range(ROWS, 2 * ROWS)))
    np.testing.assert_allclose(one + 0.02, two, atol=5e-3)


def test_every_command_takes_an_imported_cache(trained: Path, svgpipe: Run, tmp_path: Path) -> None:
    cache, model = trained / "cache", trained / "diffusion"
    shown = svgpipe("inspect", cache, "--html", tmp_path / "page.html").out
    assert "sd-vae-ft-mse" in shown and "gaussian" in shown
    assert "n01440764 tench" in shown and "warning" not in shown
    assert "source images: a feature cache that records no shards" in (tmp_path / "page.html").read_text()
    svgpipe("probe", cache, "--html", tmp_path / "probe.html")
    svgpipe("analyze", cache, "--diffusion", model, "--html", tmp_path / "analysis.html")
    assert "records no autoencoder" in svgpipe("requantize", cache, "--out", tmp_path / "int8").out
    assert FeatureCache(tmp_path / "int8").manifest.distribution == "gaussian"
    np.testing.assert_allclose(FeatureCache(tmp_path / "int8").read([5]), FeatureCache(cache).read([5]), atol=0.05)


def test_samples_of_imported_latents_need_a_decoder_of_their_shape(
    trained: Path, finished: Finished, svgpipe: Run, tmp_path: Path
) -> None:
    arguments = [
        "--autoencoder",
        finished.root / "autoencoder",
        "--reference",
        finished.root / "shards",
        "--recipe",
        "demo",
    ]
    outcome = svgpipe("sample-and-eval", "--diffusion", trained / "diffusion", *arguments, "--out", tmp_path / "out")
    assert outcome.code == 1
    assert f"holds latents of ({GRID}, {GRID}, {CHANNELS})" in outcome.err


def test_an_interrupted_import_continues(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = import_latents(Import(sources["repa"]), tmp_path / "whole", processes=1)
    written: list[int] = []

    def recorded(*arguments: Any) -> None:
        if len(written) == 1 and arguments[2] == 1 and stop:
            raise KeyboardInterrupt
        written.append(arguments[2])
        write_unit(*arguments)

    monkeypatch.setattr(module, "write_unit", recorded)
    stop = True
    with pytest.raises(KeyboardInterrupt):
        import_latents(Import(sources["repa"]), tmp_path / "again", processes=1)
    stop = False
    assert import_latents(Import(sources["repa"]), tmp_path / "again", processes=1).fingerprint == whole.fingerprint
    assert written == [0, 1]
    assert tree_bytes(tmp_path / "again", "features/**/*") == tree_bytes(tmp_path / "whole", "features/**/*")


def test_damaged_files_become_rejected_rows(latents: Latents, tmp_path: Path, svgpipe: Run) -> None:
    source, out = latents.write("repa", tmp_path / "source"), tmp_path / "cache"
    cut, bad, small = (source / f"00000/img-mean-std-{i:08d}.npy" for i in (3, 4, 5))
    cut.write_bytes(cut.read_bytes()[:200])
    np.save(bad, np.full_like(np.load(bad), np.nan))
    np.save(small, np.load(small)[:, :2])
    outcome = svgpipe("import-latents", source, "--out", out)
    assert outcome.code == 1
    assert "3 of 256 rows so far were rejected" in outcome.err
    outcome = svgpipe("import-latents", source, "--out", out, "--max-rejects", "0.02")
    assert "300 samples = 297 valid + 3 rejected" in outcome.out
    reasons = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert [entry["row"] for entry in reasons] == [3, 4, 5]
    assert "cannot be read" in reasons[0]["reason"]
    assert "not finite" in reasons[1]["reason"]
    assert "expected (1, 4, 4, 6)" in reasons[2]["reason"]
    assert not FeatureCache(out).read([3, 4, 5]).any()
    assert "whole" in svgpipe("verify", out, "--deep").out


def test_changed_files_are_refused(latents: Latents, tmp_path: Path, svgpipe: Run) -> None:
    source, out = latents.write("mar", tmp_path / "source"), tmp_path / "cache"
    svgpipe("import-latents", source, "--out", out)
    first, second = sorted((source / SYNSETS[0]).iterdir())[:2]
    other = tmp_path / "other"
    first.rename(other)
    second.rename(first)
    other.rename(second)
    os.utime(first)
    outcome = svgpipe("import-latents", source, "--out", out)
    assert outcome.code == 1
    assert "inputs.latents" in outcome.err


def test_a_damaged_unit_is_imported_again(trained: Path, svgpipe: Run) -> None:
    cache = trained / "cache"
    before, unit = FeatureCache(cache).manifest.fingerprint, cache / "features/c/1/0/0/0/0"
    unit.write_bytes(unit.read_bytes()[:-5] + b"\0" * 5)
    assert "repaired" in svgpipe("repair", cache).out
    assert FeatureCache(cache).manifest.fingerprint == before
    assert "whole" in svgpipe("verify", cache, "--deep").out


def _mistakes(folder: Path, latents: Latents) -> Iterator[tuple[str, Path, str]]:
    yield "absent", folder / "absent", "found nothing there"
    (folder / "empty").mkdir()
    yield "empty", folder / "empty", "found none of these"
    latents.write("mar", folder / "wrapped" / "train")
    yield "wrapped", folder / "wrapped", "which is not in a class folder"
    (folder / "text.zip").write_text("no zip")
    yield "no zip", folder / "text.zip", "not a whole .zip"
    loose = folder / "loose"
    loose.mkdir()
    np.savez(loose / "a.npz", moments=np.zeros((4, 2, 2), np.float32))
    yield "loose", loose, "a.npz, which is not in a class folder"
    light = latents.write("lightningdit", folder / "light")
    save_file({"latents": latents.mean.clone()}, light / "x.safetensors")
    yield "no labels", light, "found no labels"
    (light / "x.safetensors").write_bytes(b"cut")
    yield "no safetensors", light, "cannot be read"
    for name, labels, problem in (
        ("one_hot", [["a.npy", [0, 1]]], "for a.npy, found [0, 1]"),
        ("other", [["b.npy", 0]], "no label of a.npy"),
        ("gap", [["a.npy", 2]], "none is 0"),
        ("negative", [["a.npy", -1]], "found -1"),
        ("twice", [["a.npy", 0], ["a.npy", 1]], "gives a.npy two labels"),
    ):
        (folder / name).mkdir()
        np.save(folder / name / "a.npy", np.zeros((4, 2, 2), np.float32))
        (folder / name / "dataset.json").write_text(json.dumps({"labels": labels}))
        yield name, folder / name, problem


def test_mistakes_get_one_message(latents: Latents, tmp_path: Path, svgpipe: Run) -> None:
    for name, source, problem in _mistakes(tmp_path, latents):
        outcome = svgpipe("import-latents", source, "--out", tmp_path / "out")
        assert outcome.code in (1, 2), name
        assert problem in outcome.err, (name, outcome.err)
        assert not (tmp_path / "out").exists(), name


@pytest.mark.parametrize("batch", [None, 7, 256, 1000])
def test_arrays_and_batches_become_the_same_cache(batch: int | None, latents: Latents, tmp_path: Path) -> None:
    values, labels = latents.expected("lightningdit")
    features: Any = values if batch is None else (values[i : i + batch] for i in range(0, ROWS, batch))
    names = ["a", "b", "c", "unseen"]
    heldout = np.arange(ROWS) % 10 == 0
    cache = FeatureCache.create(
        tmp_path / "cache", features, labels, class_names=names, mean=1.0, std=[1, 2, 4], heldout=heldout
    )
    np.testing.assert_allclose(cache.denormalize(cache.read(range(ROWS), "flip")), values[:, 1], atol=5e-3)
    np.testing.assert_array_equal(cache.heldout, heldout)
    assert (cache.classes, cache.untrained_classes) == (names, [3])


def test_a_created_cache_is_normalised_and_not_overwritten(latents: Latents, tmp_path: Path) -> None:
    values, labels = latents.expected("lightningdit")
    cache = FeatureCache.create(tmp_path / "cache", torch.from_numpy(values[:, 0]), labels)
    stored = cache.read(range(ROWS)).astype(np.float32).reshape(-1, CHANNELS)
    np.testing.assert_allclose(stored.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(stored.std(0), 1, atol=1e-3)
    with pytest.raises(UsageError, match="holds a finished artifact"):
        FeatureCache.create(tmp_path / "cache", values, labels)


def test_heldout_rows_do_not_change_the_normalisation(latents: Latents, tmp_path: Path) -> None:
    values, labels = latents.expected("lightningdit")
    values, heldout = values[:, 0].copy(), np.arange(ROWS) >= 120  # stretches that are held out in part, and wholly
    values[heldout] += 100
    cache = FeatureCache.create(tmp_path / "cache", values, labels, heldout=heldout)
    np.testing.assert_allclose(cache.channel_mean, values[:120].mean((0, 1, 2)), atol=1e-4)


def test_a_failed_creation_can_be_repeated_with_other_features(latents: Latents, tmp_path: Path) -> None:
    values, labels = latents.expected("lightningdit")
    broken = values.copy()
    broken[280] = np.nan
    with pytest.raises(ArtifactError, match="row 280: a feature is not finite"):
        FeatureCache.create(tmp_path / "cache", broken, labels, mean=0, std=1)
    again = FeatureCache.create(tmp_path / "cache", values + 1, labels, mean=0, std=1, unit_rows=100)
    np.testing.assert_allclose(again.read(range(ROWS)), values[:, 0] + 1, atol=5e-3)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"labels": [0, 1]}, "expected 2 rows"),
        ({"labels": np.full(ROWS, 1)}, "none is 0"),
        ({"labels": np.full(ROWS, 3), "class_names": ["a", "b"]}, "expected 0 to 1 for 2 class names, found 3"),
        ({"labels": np.zeros(ROWS)}, "expected whole numbers"),
        ({"features": np.zeros((ROWS, 4))}, "found (1, 4)"),
        ({"features": [np.zeros((5, 4, 4, 2))], "mean": 0, "std": 1}, "found 5"),
        ({"features": [np.zeros((ROWS + 1, 4, 4, 2))], "mean": 0, "std": 1}, f"found {ROWS + 1}"),
        ({"features": iter([np.zeros((ROWS, 4, 4, 2))])}, "batches of an iterator"),
        ({"mean": 0}, "expected both or neither"),
        ({"mean": [0, 1], "std": 1}, "expected one number or 3"),
        ({"mean": 0, "std": 0}, "positive standard deviations"),
        ({"heldout": [True]}, "expected 300 of True and False"),
        ({"heldout": ["False"] * ROWS}, "expected 300 of True and False"),
        ({"labels": np.full(ROWS, -1)}, "expected numbers from 0 on, found -1"),
        ({"labels": []}, "found none"),
        ({"class_names": "abc"}, "expected a list of texts"),
        ({"class_names": ["caf\u00e9", "cafe\u0301", "c"]}, "distinct names"),
        ({"unit_rows": 0}, "expected a positive int"),
        ({"encoder": None}, "a text as encoder"),
        ({"features": iter([(np.zeros((ROWS, 4, 4, 2)), 0)]), "mean": 0, "std": 1}, "found tuple"),
        ({"features": np.zeros((ROWS, 4, 4, 2), complex)}, "real numbers"),
        ({"distribution": "gaussian"}, "found 3 channels"),
    ],
)
def test_mistakes_in_arrays_are_named(change: dict[str, Any], problem: str, latents: Latents, tmp_path: Path) -> None:
    values, labels = latents.expected("lightningdit")
    with pytest.raises(SvgpipeError) as raised:
        FeatureCache.create(tmp_path / "cache", **{"features": values[:, 0], "labels": labels, **change})
    assert problem in str(raised.value)


def test_other_kinds_of_arrays(latents: Latents, tmp_path: Path) -> None:
    values, labels = latents.expected("lightningdit")
    values = values[:, 0]
    stored = zarr.create_array(tmp_path / "array.zarr", data=values, chunks=(100, GRID, GRID, CHANNELS))
    halves = [values[:100], values[100:]]
    tensor = torch.from_numpy(values).bfloat16().requires_grad_()
    for number, features in enumerate((stored, halves, list(values[:, None]), tensor)):
        cache = FeatureCache.create(tmp_path / str(number), features, labels)
        np.testing.assert_allclose(cache.denormalize(cache.read(range(ROWS))), values, atol=2e-2)


def test_a_value_that_would_spoil_the_normalisation_is_named(latents: Latents, tmp_path: Path) -> None:
    values, labels = latents.expected("lightningdit")
    values = values.copy()
    values[7, 0, 0, 0, 0] = 1e25
    with pytest.raises(ArtifactError, match="row 7: a feature is not finite, or too large"):
        FeatureCache.create(tmp_path / "cache", values, labels)


def test_rows_of_every_damage_are_rejected(latents: Latents, tmp_path: Path, svgpipe: Run) -> None:
    source, out = latents.write("mar", tmp_path / "source"), tmp_path / "cache"
    files = sorted((source / SYNSETS[0]).iterdir())
    with np.load(files[0]) as first:
        whole = {name: first[name] for name in first}
    np.savez(files[0], moments=whole["moments"], moments_flip=whole["moments"][:2])
    np.savez(files[1], other=whole["moments"])
    files[2].write_bytes(b"no zip")
    np.savez(files[3], moments=whole["moments"].astype(complex))
    np.savez(files[4], moments=np.asarray([{}], object))
    np.savez(files[5], moments=np.full_like(whole["moments"], 1e30))
    files[6].write_bytes(files[6].read_bytes()[:300])
    np.save(tmp_path / "array.npy", whole["moments"])
    (tmp_path / "array.npy").replace(files[7])
    files[8].unlink()
    files[8].symlink_to("nothing")
    outcome = svgpipe("import-latents", source, "--out", out, "--max-rejects", 0.05)
    assert outcome.code == 0, outcome.err
    assert "300 samples = 291 valid + 9 rejected" in outcome.out
    assert "calibration rows cannot be used" in outcome.err
    assert "unsafely" not in outcome.err
    cache = FeatureCache(out)
    assert np.flatnonzero(~cache.valid).tolist() == list(range(9))
    assert cache.channel_std.min() > 0.5
    assert cache.channel_std.max() < 5
    assert "whole" in svgpipe("verify", out, "--deep").out


def test_empty_shards_and_shards_without_flips(latents: Latents, tmp_path: Path, svgpipe: Run) -> None:
    source, out = tmp_path / "source", tmp_path / "cache"
    source.mkdir()
    for number, part in enumerate((slice(0, 30), slice(0, 0), slice(30, 60))):
        tensors = {"latents": latents.mean[part].clone(), "labels": latents.labels[part].clone()}
        flips = {} if number == 2 else {"latents_flip": latents.flip[part].clone()}
        save_file(tensors | flips, source / f"{number}.safetensors")
    (source / "._0.safetensors").write_bytes(b"of another system")
    outcome = svgpipe("import-latents", source, "--out", out)
    assert "some files have no flips" in outcome.err
    cache = FeatureCache(out)
    assert (len(cache), cache.views) == (60, ["original"])
    expected = latents.expected("lightningdit")[0][:60, 0]
    np.testing.assert_allclose(cache.denormalize(cache.read(range(60))), expected, atol=2e-3)


def test_bfloat16_latents_and_labels_of_other_types(latents: Latents, tmp_path: Path, svgpipe: Run) -> None:
    source = tmp_path / "source"
    source.mkdir()
    tensors = {"latents": latents.mean.bfloat16(), "labels": latents.labels[:, None].to(torch.int32)}
    save_file(tensors, source / "0.safetensors")
    assert svgpipe("import-latents", source, "--out", tmp_path / "cache").code == 0
    cache = FeatureCache(tmp_path / "cache")
    expected = latents.mean.bfloat16().float().permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(cache.denormalize(cache.read(range(ROWS))), expected, atol=2e-3)
    save_file({**tensors, "labels": latents.labels.float()}, source / "0.safetensors")
    assert "labels that are whole numbers" in svgpipe("import-latents", source, "--out", tmp_path / "other").err


def test_other_statistics_and_other_encoders_are_refused_and_repair_needs_neither(
    latents: Latents, tmp_path: Path, svgpipe: Run
) -> None:
    source, out = latents.write("lightningdit", tmp_path / "source"), tmp_path / "cache"
    stats = source / "latents_stats.pt"
    torch.save({"mean": torch.zeros(1, CHANNELS, 1, 1), "std": torch.full((1, CHANNELS, 1, 1), 2.0)}, stats)
    command = ["import-latents", source, "--out", out]
    assert svgpipe(*command).code == 0
    assert "config.encoder" in svgpipe(*command, "--encoder", "another").err
    torch.save({"mean": torch.ones(1, CHANNELS, 1, 1), "std": torch.ones(1, CHANNELS, 1, 1)}, stats)
    assert "config.statistics" in svgpipe(*command).err
    stats.unlink()
    unit = out / "features/c/0/0/0/0/0"
    before = unit.read_bytes()
    unit.write_bytes(bytes(len(before)))
    assert svgpipe("repair", out).code == 0
    assert unit.read_bytes() == before
    stats.write_bytes(b"")
    assert f"{stats}: expected tensors mean and std" in svgpipe(*command[:-1], tmp_path / "broken").err


def test_repair_keeps_rows_whose_file_is_damaged_by_now(latents: Latents, tmp_path: Path, svgpipe: Run) -> None:
    source, out = latents.write("repa", tmp_path / "source"), tmp_path / "cache"
    assert svgpipe("import-latents", source, "--out", out).code == 0
    file, unit = source / "00000/img-mean-std-00000003.npy", out / "features/c/0/0/0/0/0"
    status = file.stat()
    file.write_bytes(bytes(status.st_size))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    unit.write_bytes(unit.read_bytes()[:-1])
    outcome = svgpipe("repair", out)
    assert outcome.code == 1
    assert f"error: {file}: cannot be read" in outcome.err
    assert FeatureCache(out).manifest.num_valid == ROWS
    assert FeatureCache(out).valid.all()


def test_heldout_latents_must_be_others_of_known_classes(
    photographs: Path, sources: dict[str, Path], tmp_path: Path, svgpipe: Run
) -> None:
    command = ["import-latents", sources["mar"], "--out", tmp_path / "cache", "--heldout"]
    assert "found the same files" in svgpipe(*command, sources["mar"]).err
    assert "expected the layout moments" in svgpipe(*command, sources["repa"]).err
    shutil.copytree(sources["mar"], tmp_path / "copy", copy_function=shutil.copyfile)
    assert "found a copy of them" in svgpipe(*command, tmp_path / "copy").err
    other = Latents(photographs, offset=1).write("mar", tmp_path / "other")
    names = tmp_path / "names.txt"
    names.write_text("bee\n" + "".join(f"{synset} name\n" for synset in SYNSETS))
    (other / SYNSETS[0]).rename(tmp_path / "away")  # classes are matched by name, not by position
    assert svgpipe(*command, other, "--class-names", names).code == 0
    cache = FeatureCache(tmp_path / "cache")
    assert np.bincount(cache.labels[cache.heldout]).tolist() == [0, 0, 100, 100]
    assert cache.classes == ["bee", *(f"{synset} name" for synset in SYNSETS)]
    names.write_text("tench\ngoldfish\nshark\n")
    refused = svgpipe(*command[:2], "--out", tmp_path / "none", "--class-names", names)
    assert refused.code == 2 and "found none for n01440764" in refused.err
    (other / SYNSETS[1]).rename(other / "n99999999")
    assert "found n99999999" in svgpipe(*command, other).err
    (other / "n00000000").mkdir()
    refused = svgpipe("import-latents", other, "--out", tmp_path / "none")
    assert refused.code == 2 and "found none in n00000000" in refused.err


def test_numbers_become_synsets_with_names(sources: dict[str, Path], tmp_path: Path, svgpipe: Run) -> None:
    out = tmp_path / "cache"
    assert svgpipe("import-latents", sources["edm2"], "--out", out, "--class-names", "imagenet").code == 0
    cache = FeatureCache(out)
    assert (len(cache.classes), cache.classes[:2]) == (1000, SYNSETS[:2])
    assert "n01443537 goldfish" in svgpipe("inspect", out).out
