"""Recipes: built-in, from a file, overridden, and rejected with a helpful message."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel, ValidationError

from svgpipe.manifests.errors import UsageError
from svgpipe.manifests.precision import computes_bfloat16
from svgpipe.manifests.recipe import Recipe
from svgpipe.manifests.recipe_loader import builtin_names, load_recipe, recipe_yaml
from svgpipe.models.backbone import own_input
from svgpipe.pipeline.preflight import check_model_settings
from svgpipe.stages.networks.diffusion import width_warning
from svgpipe.stages.runtime import device
from svgpipe.stages.runtime.device import autocast, warn_if_imitated


def test_builtins_are_the_documented_ones() -> None:
    others = ("dit-xl-sdvae", "rae", "rae-xl", "repa-xl-sdvae", "sit-xl-sdvae", "sit-xl-vavae")
    systems = (*others, "svg-b", "svg-l", "svg-xl", "svg-xl-2026")
    of_systems = (f"imagenet256-{name}" for name in systems)
    names = ["ade20k-probe", "demo", "fashion-mnist", *of_systems, "nyuv2-probe"]
    assert builtin_names() == names
    for name in names:
        assert load_recipe(name).name == name


def test_xl_has_the_official_values() -> None:
    recipe = load_recipe("imagenet256-svg-xl")
    assert (recipe.diffusion.model.width, recipe.diffusion.model.depth, recipe.diffusion.model.heads) == (1152, 28, 16)
    assert (recipe.diffusion.batch_size, recipe.diffusion.learning_rate) == (256, 1e-4)
    assert (recipe.diffusion.time_shift, recipe.evaluation.time_shift) == (0.4, 0.15)
    assert (recipe.diffusion.ema_decays, recipe.diffusion.label_dropout) == ((0.9999,), 0.1)
    assert recipe.autoencoder.decoder.ch_mult == (1, 1, 2, 2, 4)


def test_sizes_extend_xl_and_change_only_the_model() -> None:
    xl, small = load_recipe("imagenet256-svg-xl"), load_recipe("imagenet256-svg-b")
    assert small.autoencoder == xl.autoencoder
    assert small.diffusion.model.width == 768


def test_recipes_for_vision_features_have_what_rae_and_raev2_have() -> None:
    rae, newest = load_recipe("imagenet256-rae-xl"), load_recipe("imagenet256-svg-xl-2026")
    backbone = rae.autoencoder.backbone
    assert (rae.autoencoder.kind, backbone.input_size, rae.autoencoder.decoder_noise) == ("vision", 224, 0.8)
    assert own_input(backbone.name)[1] is None  # a ViT; the feature level of the extended recipe is not needed
    for recipe in (rae, newest):
        model, head = recipe.diffusion.model, recipe.diffusion.model.wide_head
        assert head is not None and (head.width, head.depth, model.rms_norm, model.qk_norm) == (2048, 2, True, False)
        assert recipe.diffusion.time_shift == recipe.evaluation.time_shift == "from-dimension"
        check_model_settings(recipe)
    assert newest.diffusion.predict_data and newest.evaluation.internal_guidance
    assert newest.autoencoder == load_recipe("imagenet256-svg-xl").autoencoder.model_copy(update={"decoder_noise": 0.8})


def test_no_built_in_model_is_narrower_than_its_tokens() -> None:
    channels = {"svg": 392, "vision": 384}  # of DINOv3 S; RAE has a head that is wider than its 768
    for name in builtin_names():
        recipe = load_recipe(name)
        kind = recipe.autoencoder.kind
        values = 120 if name in ("demo", "fashion-mnist") else channels.get(kind, recipe.autoencoder.kl.channels)
        assert width_warning(recipe.diffusion.model, values) is None, name
    narrow = width_warning(load_recipe("demo").diffusion.model, 392)
    assert narrow is not None and "width 192 is below the 392 values of a token" in narrow
    patched = load_recipe("demo", ["diffusion.model.patch_size=2"]).diffusion.model
    assert width_warning(patched, 100) is not None and width_warning(patched, 48) is None


def test_recipes_of_other_systems_are_theirs() -> None:
    sit, dit, repa, vavae, rae = (
        load_recipe(f"imagenet256-{name}")
        for name in ("sit-xl-sdvae", "dit-xl-sdvae", "repa-xl-sdvae", "sit-xl-vavae", "rae")
    )
    for recipe in (sit, dit, repa):
        assert (recipe.autoencoder.kind, recipe.extract.factor, recipe.diffusion.model.patch_size) == ("kl", 0.18215, 2)
        assert recipe.evaluation.deviations() == []
    assert (sit.evaluation.solver, dit.evaluation.solver, repa.evaluation.solver) == ("dopri5", "ddpm", "sde")
    assert dit.diffusion.objective == "ddpm" and repa.diffusion.align is not None and repa.diffusion.align.depth == 8
    assert (vavae.autoencoder.kind, vavae.autoencoder.kl.channels, vavae.extract.factor) == ("aligned-kl", 32, None)
    assert vavae.diffusion.model.patch_size is None and vavae.diffusion.model.learn_sigma
    assert (rae.autoencoder.kind, rae.evaluation.preset) == ("vision", "paper-svg-unguided")


def test_a_preset_fills_in_what_is_not_given(tmp_path: Path) -> None:
    assert load_recipe("demo", ["evaluation.preset=repa"]).evaluation.deviations() == []
    file = tmp_path / "own.yaml"
    file.write_text("extends: demo\nevaluation: {preset: sit-sde, steps: [10]}\n")
    recipe = load_recipe(str(file)).evaluation
    assert (recipe.solver, recipe.guidance, recipe.guidance_channels, recipe.steps) == ("sde", (1.5,), 3, (10,))
    assert recipe.deviations() == ["steps: [10] instead of [250]"]
    # The command line's preset wins over the recipe, and other options of the command line over it, in any order.
    changed = load_recipe(str(file), ["evaluation.guidance=[2.0]", "evaluation.preset=repa"]).evaluation
    assert (changed.solver, changed.guidance, changed.guidance_mode) == ("sde", (2.0,), "interval-0.3-1")
    assert changed.steps == (250,) and changed.deviations() == ["guidance: [2.0] instead of [1.8]"]
    # A preset also sets what only some solvers have.
    noisy = load_recipe(str(file), ["evaluation.sde={diffusion: decreasing}"]).evaluation
    assert any(line.startswith("sde: {'diffusion': 'decreasing'") for line in noisy.deviations())
    file.write_text("extends: demo\nevaluation: {solver: sde, sde: {last_step: euler}}\n")
    assert load_recipe(str(file), ["evaluation.preset=sit-ode"]).evaluation.sde is None
    file.write_text("extends: demo\nevaluation: {preset: sit-sde, steps: [10]}\n")
    whole = load_recipe("demo", ["evaluation={preset: dit}"]).evaluation
    assert (whole.solver, whole.labels, whole.extractor.kind) == ("ddpm", "drawn", "inception")
    # Without the preset of its base, a recipe has nothing of it; with another one, nothing of the first.
    for text, solver, steps in (("preset: null", "euler", (25,)), ("preset: dit", "ddpm", (250,))):
        (tmp_path / "child.yaml").write_text(f"extends: own.yaml\nevaluation: {{{text}}}\n")
        child = load_recipe(str(tmp_path / "child.yaml")).evaluation
        assert (child.solver, child.steps if solver == "ddpm" else (25,)) == (solver, steps)
        assert child.extractor == load_recipe("demo").evaluation.extractor
    # A printed recipe can be given another preset.
    printed = recipe_yaml(load_recipe("imagenet256-dit-xl-sdvae"))
    (tmp_path / "printed.yaml").write_text(printed)
    assert load_recipe(str(tmp_path / "printed.yaml")) == load_recipe("imagenet256-dit-xl-sdvae")
    (tmp_path / "printed.yaml").write_text(printed.replace("  preset: dit", "  preset: sit-sde"))
    assert load_recipe(str(tmp_path / "printed.yaml")).evaluation.solver == "sde"
    with pytest.raises(UsageError, match=r"command line: diffusion: objective ddpm learns the variance[^,]*$"):
        load_recipe("demo", ["diffusion.objective=ddpm"])
    with pytest.raises(UsageError, match=r"evaluation\.preset: expected 'paper-svg'"):
        load_recipe("demo", ["evaluation.preset=paper"])


def test_a_nullable_section_can_be_null_and_set() -> None:
    assert load_recipe("imagenet256-repa-xl-sdvae", ["diffusion.align=null"]).diffusion.align is None
    align = load_recipe("demo", ["diffusion.align.depth=3"]).diffusion.align
    assert align is not None and (align.depth, align.coefficient) == (3, 0.5)
    with pytest.raises(UsageError, match="expected a section"):
        load_recipe("demo", ["diffusion.model=null"])


def test_overrides_apply_in_order_and_read_numbers() -> None:
    recipe = load_recipe("demo", ["diffusion.steps=5", "diffusion.learning_rate=3e-4", "diffusion.steps=7"])
    assert (recipe.diffusion.steps, recipe.diffusion.learning_rate) == (7, 3e-4)


def test_recipes_are_frozen() -> None:
    with pytest.raises(ValidationError):
        load_recipe("demo").diffusion.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("diffusion.stepz=3", ["diffusion.stepz", "did you mean diffusion.steps"]),
        ("difusion.steps=3", ["difusion", "did you mean diffusion"]),
        ("diffusion.model.widht=64", ["diffusion.model.widht", "diffusion.model.width"]),
        ("diffusion.steps=0", ["diffusion.steps", "greater than 0", "found 0"]),
        ("diffusion.steps=many", ["diffusion.steps", "'many'"]),
        ("diffusion.model.heads=5", ["width 192", "heads 5"]),
        ("autoencoder.residual.heads=7", ["width 96", "heads 7"]),
        ("autoencoder.decoder.ch=20", ["32 groups"]),
        ("extract.views=[flip]", ["original"]),
        ("diffusion=3", ["diffusion", "expected a section"]),
        ("diffusion.steps", ["section.key=value"]),
        ("diffusion.steps={", ["not YAML"]),
        ("name.first=x", ["name is a value"]),
        ("evaluation.solver=rk4", ["evaluation.solver", "euler", "rk4"]),
        ("diffusion.steps=true", ["diffusion.steps: expected a number, found True"]),
        ("diffusion.steps=010", ["diffusion.steps: expected a number, found '010'"]),
        ("diffusion.steps=1:30", ["diffusion.steps: expected a number, found '1:30'"]),
        ("diffusion.steps=1_000", ["diffusion.steps: expected a number, found '1_000'"]),
        ("diffusion.steps=0x10", ["diffusion.steps: expected a number, found '0x10'"]),
        ('diffusion.steps="7"', ["diffusion.steps: expected a number, found '7'"]),
        ("diffusion.steps=7 # few", ["diffusion.steps: expected a number, found '7 # few'"]),
        ("evaluation.steps=[5, true]", ["evaluation.steps: expected a number"]),
        ("evaluation.steps=[5] # few", ["expected one value, found '# few' after it"]),
        ("shard.keep_damaged=1", ["shard.keep_damaged: expected true or false, found 1"]),
        ("shard.keep_damaged=yes", ["shard.keep_damaged: expected true or false, found 'yes'"]),
        ("name=3", ["name: expected a text, found 3"]),
    ],
)
def test_refused_overrides_say_what_is_wrong(override: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe("demo", [override])
    for word in words:
        assert word in str(caught.value)


def test_unknown_names_and_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean imagenet256-svg-xl"):
        load_recipe("imagenet256-svg-xxl")
    with pytest.raises(UsageError, match="found none"):
        load_recipe(str(tmp_path / "none.yaml"))
    broken = tmp_path / "broken.yaml"
    broken.write_text("diffusion: [")
    with pytest.raises(UsageError, match="expected valid YAML"):
        load_recipe(str(broken))
    broken.write_text("diffusion: {steps: 5}\nname: x\ndiffusion: {depth: 2}\n")
    with pytest.raises(UsageError, match="'diffusion' is given twice, in lines 1 and 3"):
        load_recipe(str(broken))
    broken.write_text("- a\n- b\n")
    with pytest.raises(UsageError, match="expected sections"):
        load_recipe(str(broken))


def test_a_file_may_extend_and_a_circle_is_refused(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: demo\nname: mine\ndiffusion: {steps: 11}\n")
    recipe = load_recipe(str(mine))
    assert (recipe.name, recipe.diffusion.steps) == ("mine", 11)
    assert recipe.diffusion.batch_size == load_recipe("demo").diffusion.batch_size
    mine.write_text(f"extends: {mine}\n")
    with pytest.raises(UsageError, match="extends"):
        load_recipe(str(mine))


def test_a_base_file_lies_relative_to_its_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lab").mkdir()
    (tmp_path / "base.yaml").write_text("extends: demo\ndiffusion: {steps: 11}\n")
    (tmp_path / "lab" / "mine.yaml").write_text("extends: ../base.yaml\nname: mine\n")
    monkeypatch.chdir("/")
    assert load_recipe(str(tmp_path / "lab" / "mine.yaml")).diffusion.steps == 11


def test_an_override_changes_one_of_two_aliased_sections(tmp_path: Path) -> None:
    recipe = tmp_path / "aliased.yaml"
    recipe.write_text("evaluation: {extractor: &e {kind: backbone}}\nreconstruction: {extractor: *e}\n")
    found = load_recipe(str(recipe), ["evaluation.extractor.kind=inception"])
    assert (found.evaluation.extractor.kind, found.reconstruction.extractor.kind) == ("inception", "backbone")


def test_a_number_in_quotes_stays_text() -> None:
    """For example from `--ema 0.9999`."""
    recipe = load_recipe(None, ['evaluation.weights="0.9999"', "diffusion.learning_rate=3e-4"])
    assert recipe.evaluation.weights == "0.9999"
    assert recipe.diffusion.learning_rate == 3e-4


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Forget the cached facts about this processor and its warnings, before and after the test."""
    for cached in (computes_bfloat16, warn_if_imitated):
        cached.cache_clear()
    yield
    for cached in (computes_bfloat16, warn_if_imitated):
        cached.cache_clear()


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize(("instructions", "dtype"), [({"amx_bf16": True}, "bfloat16"), ({"avx2": True}, "float32")])
def test_precision_auto_follows_the_processor(
    monkeypatch: pytest.MonkeyPatch, instructions: dict[str, bool], dtype: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    said: list[str] = []
    monkeypatch.setattr(device.log, "warning", said.append)
    demo = load_recipe("demo")
    stages = (demo.autoencoder, demo.diffusion, demo.evaluation)
    assert [stage.model_dump(mode="json")["precision"] for stage in stages] == [dtype] * 3
    assert load_recipe("demo", ["diffusion.precision=bfloat16"]).diffusion.precision == "bfloat16"

    for _ in range(2):
        autocast(torch.device("cpu"), "bfloat16")
    assert len(said) == (dtype == "float32") and all("no bfloat16 instructions" in line for line in said)


def test_every_setting_has_a_description() -> None:
    sections: list[type[BaseModel]] = [Recipe]
    for section in sections:
        for name, field in section.model_fields.items():
            if isinstance(field.default, BaseModel):
                sections.append(type(field.default))
            else:
                assert field.description, f"{section.__name__}.{name}"
    assert len(sections) > 10


def test_values_are_read_as_written() -> None:
    overrides = [
        "evaluation.steps=5",
        "evaluation.guidance=1",
        "source=photos #1: new",
        "diffusion.clip_grad_norm=1e-1",
        "diffusion.compile=false",
        "shard.crop=null",
    ]
    recipe = load_recipe("demo", overrides)
    assert recipe.evaluation.steps == (5,) and recipe.evaluation.guidance == (1.0,)
    assert recipe.source == "photos #1: new" and recipe.diffusion.clip_grad_norm == 0.1
    assert recipe.diffusion.compile is False and recipe.shard.crop is None
