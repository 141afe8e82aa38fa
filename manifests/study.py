"""Study files: variants of one pipeline that are compared over one shard set."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import UsageError
from .manifest import summarise
from .recipe import Recipe
from .recipe_loader import YAML_SUFFIXES, load_recipe
from .yaml_values import parse_yaml

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
PaperColumn = Literal["svg", "sd_vae", "va_vae"]
# What must be equal so that numbers compare: keys of a recipe, and keys of its section `evaluation`.
SHARED = ("source", "heldout", "heldout_labels", "unlabelled", "shard", "reconstruction")
COMMON = ("num_samples", "seed", "labels", "extractor", "reference_images", "bootstrap")


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class VariantFile(_Model):
    """One variant of a study: a recipe with changes, or imported weights."""

    title: str | None = Field(None, description="Name on the page; null: the key.")
    recipe: str | None = Field(None, description="Recipe of this variant; null: that of the study.")
    set: dict[str, Any] = Field(default_factory=dict, description="Changes: section.key: value.")
    align: str | None = Field(None, description="Variant whose features the model is aligned with.")
    autoencoder: str | None = Field(None, description="Finished autoencoder, for example imported, to use as it is.")
    diffusion: str | None = Field(None, description="Finished diffusion model on its latents, to use as it is.")
    paper: PaperColumn | None = Field(None, description="Column of the paper's tables that has the same setting.")


class StudyFile(_Model):
    """A study: what its variants have in common, and the variants."""

    name: str
    recipe: str = Field(description="Recipe that all variants begin with.")
    set: dict[str, Any] = Field(default_factory=dict, description="Changes for all variants: section.key: value.")
    reference: str | None = Field(
        None,
        description="Real images, or .npz with mu and sigma, that distances are measured to; null: training split.",
    )
    variants: dict[str, VariantFile]


class Variant(_Model):
    """A variant with its whole recipe."""

    name: str
    title: str
    recipe: Recipe
    tokenizer: str = Field(description="Name of the first variant with the same autoencoder and extraction.")
    align: str | None
    autoencoder: str | None
    diffusion: str | None
    paper: PaperColumn | None


class Study(_Model):
    """A checked study."""

    name: str
    reference: str | None
    variants: list[Variant]

    def variant(self, name: str) -> Variant:
        """Return a variant by its name. Raises StopIteration for a name that does not exist."""
        return next(variant for variant in self.variants if variant.name == name)

    def chosen(self, names: list[str] | None) -> list[Variant]:
        """Return the variants of these names in the order of the study; all for None.

        Raises:
            UsageError: a name does not exist.
        """
        known = [variant.name for variant in self.variants]
        if unknown := [name for name in names or [] if name not in known]:
            raise UsageError(f"--only {unknown[0]}: expected one of {', '.join(known)}.")
        return [variant for variant in self.variants if names is None or variant.name in names]


def builtin_studies() -> list[str]:
    """Return the names of the built-in studies."""
    folder = resources.files("svgpipe.manifests").joinpath("studies")
    return sorted(Path(item.name).stem for item in folder.iterdir() if item.name.endswith(".yaml"))


def load_study(name_or_file: str, overrides: list[str] | None = None) -> Study:
    """Return a built-in study or one from a YAML file, with the recipes of all its variants.

    Args:
        name_or_file: name or file.
        overrides: `section.key=value` for the recipes of all variants.

    Raises:
        UsageError: no such study, an invalid file or recipe, or variants that cannot be compared.
    """
    text, where = _read(name_or_file)
    raw = parse_yaml(text, where)
    if not isinstance(raw, dict):
        raise UsageError(f"{where}: expected a study with name, recipe and variants.")
    if isinstance(given := raw.get("variants"), dict):  # `svg:` alone is a variant without changes
        raw["variants"] = {name: {} if variant is None else variant for name, variant in given.items()}
    try:
        file = StudyFile.model_validate(raw)
    except ValidationError as error:
        raise UsageError(f"{where}: {summarise(error)}.") from error
    if bad := [name for name in file.variants if not NAME.fullmatch(name)]:
        raise UsageError(f"{where}: variant {bad[0]!r}: expected letters, digits, '-', '_' and '.': it names a folder.")
    folder = Path(name_or_file).parent if Path(name_or_file).suffix in YAML_SUFFIXES else None
    study = Study(name=file.name, reference=file.reference, variants=_variants(file, folder, overrides or [], where))
    _require_comparable(study, where)
    return study


def _read(name_or_file: str) -> tuple[str, str]:
    path = Path(name_or_file)
    if path.suffix in YAML_SUFFIXES:
        if not path.is_file():
            raise UsageError(f"{path}: expected a study file, found none.")
        return path.read_text(errors="replace"), str(path)
    if name_or_file not in builtin_studies():
        raise UsageError(f"study {name_or_file!r}: expected one of {', '.join(builtin_studies())} or a .yaml file.")
    return resources.files("svgpipe.manifests").joinpath("studies", f"{name_or_file}.yaml").read_text(), name_or_file


def _variants(file: StudyFile, folder: Path | None, overrides: list[str], where: str) -> list[Variant]:
    variants: list[Variant] = []
    for name, given in file.variants.items():
        recipe_name = given.recipe or file.recipe
        if folder is not None and Path(recipe_name).suffix in YAML_SUFFIXES:
            recipe_name = str(folder / recipe_name)
        changes = [f"{key}={_as_text(value)}" for part in (file.set, given.set) for key, value in part.items()]
        try:
            recipe = load_recipe(recipe_name, [*changes, *overrides])
        except UsageError as error:
            raise UsageError(f"{where}: variant {name}: {error}") from error
        same = next((other for other in variants if _same_tokenizer(other, recipe, given)), None)
        variants.append(
            Variant(
                name=name,
                title=given.title or name,
                recipe=recipe,
                tokenizer=name if same is None else same.tokenizer,
                **given.model_dump(include={"align", "autoencoder", "diffusion", "paper"}),
            )
        )
    return variants


def _as_text(value: Any) -> str:
    """Return a value as `--set` takes it."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()


def _same_tokenizer(other: Variant, recipe: Recipe, given: VariantFile) -> bool:
    ours = (recipe.autoencoder, recipe.extract, given.autoencoder)
    return (other.recipe.autoencoder, other.recipe.extract, other.autoencoder) == ours


def _require_comparable(study: Study, where: str) -> None:
    """Check that the variants can be compared.

    Raises:
        UsageError: other images or another measure, or an `align` that names no variant with features.
    """
    if not study.variants:
        raise UsageError(f"{where}: expected at least one variant.")
    first, *others = study.variants
    for other in others:
        for key, one, two in _shared(first.recipe, other.recipe):
            if one != two:
                raise UsageError(
                    f"{where}: variants {first.name} and {other.name} differ in {key}, so they cannot be compared. Set "
                    "it for all variants, in `set` of the study."
                )
    if first.recipe.evaluation.extractor.kind == "backbone":
        raise UsageError(
            f"{where}: evaluation.extractor.kind=backbone measures every tokenizer in another feature space. Choose "
            "inception, or timm with a name."
        )
    titles = [variant.title for variant in study.variants]
    if twice := [title for title in titles if titles.count(title) > 1]:
        raise UsageError(f"{where}: the title {twice[0]!r} is given twice. Lines in charts have titles.")
    names = [variant.name for variant in study.variants]
    for variant in study.variants:
        _require_target(study, variant, names, where)


def _shared(one: Recipe, two: Recipe) -> list[tuple[str, Any, Any]]:
    """Return what two variants must have in common: name and both values."""
    images = [(key, getattr(one, key), getattr(two, key)) for key in SHARED]
    images.append(("autoencoder.image_size", one.autoencoder.image_size, two.autoencoder.image_size))
    return images + [
        (f"evaluation.{key}", getattr(one.evaluation, key), getattr(two.evaluation, key)) for key in COMMON
    ]


def _require_target(study: Study, variant: Variant, names: list[str], where: str) -> None:
    if variant.diffusion is not None and variant.autoencoder is None:
        raise UsageError(f"{where}: variant {variant.name}: diffusion needs the autoencoder of its latents.")
    if variant.align is None:
        section = variant.recipe.autoencoder
        if variant.recipe.diffusion.align is not None and not section.encodes_with_backbone and not variant.diffusion:
            raise UsageError(
                f"{where}: variant {variant.name}: diffusion.align needs `align`: a variant of kind vision or svg, "
                f"because latents of kind {section.kind} hold no features."
            )
        return
    if variant.align not in names:
        raise UsageError(f"{where}: variant {variant.name}: align names {variant.align!r}, which is no variant.")
    target = study.variant(variant.align)
    if target.autoencoder is None and not target.recipe.autoencoder.encodes_with_backbone:
        raise UsageError(
            f"{where}: variant {variant.name}: align names {variant.align}, whose latents are those of a VAE. Name a "
            "variant of kind vision or svg."
        )
    if variant.recipe.diffusion.align is None:
        raise UsageError(f"{where}: variant {variant.name}: align needs diffusion.align, for example {{depth: 4}}.")
