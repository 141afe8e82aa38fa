"""`backbone.layers` and `last`: several blocks of a ViT from one pass, and caches that share them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from svgpipe.manifests.cache import FeatureCache
from svgpipe.models.backbone import Backbone, Layers
from svgpipe.pipeline.cli import main

from .conftest import STORE, Finished, Outcome, tree_bytes

VIT = {"name": "vit_tiny_patch16_224", "weights": "random", "input_size": 32, "feature_level": None}
WIDTH, DEPTH = 192, 12
ONE, SOME, ALL = [5], [2, 5], [2, 5, 11]  # the last is the whole model


def _outputs(backbone: Backbone, images: Tensor) -> list[Tensor]:
    """Return the patch tokens of every block after the final norm, (B,C,h,w) each."""
    seen: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda module, given, output: seen.append(output))
        for block in backbone.model.blocks
    ]
    backbone.model.forward_features(backbone.prepare(images))
    for hook in hooks:
        hook.remove()
    prefix, side = backbone.model.num_prefix_tokens, backbone.grid
    normed = [backbone.model.norm(tokens)[:, prefix:] for tokens in seen]
    return [tokens.transpose(1, 2).reshape(len(images), -1, side, side) for tokens in normed]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_plus_patch16_dinov3"])
@torch.inference_mode()
def test_blocks_are_combined_after_the_final_norm(name: str) -> None:
    torch.manual_seed(0)
    whole = Backbone(name, input_size=32)
    torch.nn.init.normal_(whole.model.norm.weight, mean=1, std=0.3)
    images = torch.rand(2, 3, 32, 32)
    outputs = _outputs(whole, images)

    def combined(*arguments: Any) -> Tensor:
        backbone = Backbone(name, input_size=32, layers=Layers(*arguments))
        backbone.model.load_state_dict(whole.model.state_dict())
        features = backbone(images)
        assert features.shape[1] == backbone.channels
        return features

    three = [outputs[number] for number in ALL]
    grid_mean = three[-1].mean(dim=(2, 3), keepdim=True)
    expected = {
        ((11,),): whole(images),
        (1,): whole(images),
        (tuple(ALL),): torch.stack(three).mean(0),
        (3, "mean"): torch.stack(outputs[-3:]).mean(0),
        (tuple(reversed(ALL)), "concat"): torch.cat(three, 1),
        (tuple(ALL), "mean", True): torch.stack(three).mean(0) + grid_mean,
        (tuple(ALL), "concat", True): torch.cat([output + grid_mean for output in three], 1),
    }
    for arguments, features in expected.items():
        torch.testing.assert_close(combined(*arguments), features, msg=str(arguments), atol=2e-5, rtol=1e-5)


def test_blocks_after_the_last_one_do_not_run() -> None:
    backbone = Backbone("vit_tiny_patch16_224", input_size=32, layers=Layers((1, 3)))
    ran: list[int] = []
    for number, block in enumerate(backbone.model.blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    backbone(torch.rand(1, 3, 32, 32))
    assert ran == [0, 1, 2, 3]


def test_bad_layers_are_refused_by_name(svgpipe: Callable[..., Outcome], tmp_path: Path, finished: Finished) -> None:
    shards, recipe = ["--shards", finished.root / "shards"], ["--recipe", finished.recipe_file]
    command = ["train-autoencoder", *shards, "--out", tmp_path / "out", *recipe]
    cnn = svgpipe(*command, "--set", "autoencoder.backbone.layers=[1]")
    assert cnn.code == 2 and "layers: expected null for this CNN" in cnn.err
    for change, message in {
        "layers=[1, 1]": "each once, found [1, 1]",
        "layers=[]": "each once, found []",
        "layers=[-1]": "greater than or equal to 0",
        "last=0": "greater than 0",
        "combine=mean": "need layers or last",
        "spatial_mean=true": "need layers or last",
        "combine=sum": "'mean' or 'concat'",
    }.items():
        found = svgpipe(*command, "--set", f"autoencoder.backbone.{change}")
        assert found.code == 2 and message in found.err, found.err
    both = svgpipe(*command, "--set", "autoencoder.backbone.last=2", "--set", "autoencoder.backbone.layers=[1]")
    assert both.code == 2 and "give layers or last, not both" in both.err
    assert not (tmp_path / "out" / "manifest.json").exists()
    recipe_file = tmp_path / "vit.yaml"
    recipe_file.write_text(yaml.safe_dump(_recipe(finished, layers=[*ALL, DEPTH])))
    missing = svgpipe("train-autoencoder", *shards, "--out", tmp_path / "vit", "--recipe", recipe_file)
    assert missing.code == 2 and "layers: expected numbers of its 12 blocks, 0..11, found 12" in missing.err
    recipe_file.write_text(yaml.safe_dump(_recipe(finished, last=DEPTH + 1)))
    many = svgpipe("train-autoencoder", *shards, "--out", tmp_path / "vit", "--recipe", recipe_file)
    assert many.code == 2 and "last: expected 1..12 of its 12 blocks, found 13" in many.err


def _recipe(finished: Finished, **changes: Any) -> dict[str, Any]:
    """Return the tiny recipe with a ViT."""
    recipe: dict[str, Any] = yaml.safe_load(finished.recipe_file.read_text())
    section = recipe["autoencoder"]
    decoder = {**section["decoder"], "ch_mult": [1, 1, 1, 1, 1]}
    recipe["autoencoder"] = {
        **section,
        "kind": "vision",
        "steps": 1,
        "decoder": decoder,
        "backbone": {**VIT, **changes},
    }
    return recipe


@pytest.fixture(scope="module")
def caches(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Trains an autoencoder with blocks of a ViT, and extracts its cache, once for each setting."""
    root = tmp_path_factory.mktemp("layers")

    def made(name: str, *options: object, **changes: Any) -> Path:
        at = root / name
        if not at.exists():
            at.mkdir()
            (at / "recipe.yaml").write_text(yaml.safe_dump(_recipe(finished, **changes)))
            given = ["--shards", finished.root / "shards", "--recipe", at / "recipe.yaml"]
            for arguments in (
                ["train-autoencoder", *given, "--out", at / "autoencoder"],
                ["extract", *given, "--autoencoder", at / "autoencoder", "--out", at / "cache", *options],
            ):
                assert main([str(argument) for argument in arguments]) == 0
        return at

    return made


def test_caches_of_single_blocks_are_columns_of_one_extraction(
    finished: Finished, caches: Callable[..., Path], svgpipe: Callable[..., Outcome], tmp_path: Path
) -> None:
    every = caches("all", layers=ALL, combine="concat")
    assert FeatureCache(every / "cache").shape[-1] == 3 * WIDTH
    inside = {"one": caches("one", layers=ONE), "two": caches("two", layers=SOME, combine="concat")}
    for name, whole in inside.items():
        given = ["--shards", finished.root / "shards", "--recipe", whole / "recipe.yaml"]
        given += ["--autoencoder", whole / "autoencoder", "--out", tmp_path / name]
        done = svgpipe("extract", *given, "--vision-from", every / "cache")
        assert done.code == 0 and "vision features are copied from" in done.err, done.err
        assert tree_bytes(tmp_path / name, *STORE) == tree_bytes(whole / "cache", *STORE)
    assert FeatureCache(tmp_path / "two").manifest.backbone == f"{VIT['name']}, concat of blocks 2, 5"


def test_other_combinations_do_not_share_features(
    finished: Finished, caches: Callable[..., Path], svgpipe: Callable[..., Outcome], tmp_path: Path
) -> None:
    every = caches("all", layers=ALL, combine="concat")
    others: dict[str, dict[str, Any]] = {
        "mean": {"layers": SOME},
        "more": {"layers": [3, 5], "combine": "concat"},
        "plus": {"layers": ONE, "spatial_mean": True},
        "last": {},
    }
    for name, changes in others.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(_recipe(finished, **changes)))
        given = ["--shards", finished.root / "shards", "--recipe", path]
        assert svgpipe("train-autoencoder", *given, "--out", tmp_path / name).code == 0
        given += ["--autoencoder", tmp_path / name, "--out", tmp_path / "cache"]
        found = svgpipe("extract", *given, "--vision-from", every / "cache")
        assert found.code == 1 and "its vision features are not those of this extraction" in found.err
        assert "backbone.layers" in found.err
