"""Loads recipes by name or from a file, and overrides single values.

`--set section.key=value` overrides a value. A file may begin with `extends: NAME|FILE` and then lists only its
differences. `evaluation.preset` and `evaluation.protocol` fill in keys that are not given beside them. An unknown key
is an error that names the nearest valid key.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Union

import yaml
from pydantic import BaseModel, ValidationError

from .errors import UsageError
from .evaluation_section import EvaluationSection
from .presets import NAMES as PRESETS
from .presets import preset_values
from .protocols import NAMES as PROTOCOLS
from .protocols import protocol_values
from .recipe import Recipe
from .section import Section
from .yaml_values import parse_value, parse_yaml

MOVED = {"autoencoder.residual.enabled": "autoencoder.kind: svg or vision"}  # keys of earlier versions
YAML_SUFFIXES = {".yaml", ".yml"}
NAMED_OVERRIDES = ("evaluation.preset=", "evaluation.protocol=")


def builtin_names() -> list[str]:
    """Return the names of the built-in recipes."""
    folder = resources.files("svgpipe.manifests").joinpath("recipes")
    return sorted(Path(item.name).stem for item in folder.iterdir() if item.name.endswith(".yaml"))


def load_recipe(name_or_file: str | None, overrides: Sequence[str] = ()) -> Recipe:
    """Return a built-in recipe or one from a YAML file (None: all defaults), with `section.key=value` overrides.

    Raises:
        UsageError: no such recipe or file, not YAML, an unknown key, or an invalid value.
    """
    layers, where = _read_layers(name_or_file) if name_or_file is not None else ([], "recipe")
    for layer in layers:
        _refuse_unknown_keys(layer, Recipe, where)
    # First preset and protocol, so that other options of the command line win over them, and they over the recipe.
    first = [override for override in overrides if override.startswith(NAMED_OVERRIDES)]
    for override in first:
        layers.append({})
        _apply_override(layers[-1], override)
    raw = _merged(layers)
    for override in overrides:
        if override not in first:
            _apply_override(raw, override)
    if any(override.startswith("evaluation=") for override in overrides):  # it replaces the whole section
        section = raw["evaluation"]
        raw["evaluation"] = {**_named_values("preset", section), **_named_values("protocol", section), **section}
    _refuse_unknown_keys(raw, Recipe, "--set")
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        given = {name.partition("=")[0] for name in overrides}
        lines = [_explained(dict(one), where, given) for one in error.errors()]
        raise UsageError("\n".join(lines)) from error


def _explained(error: dict[str, Any], where: str, given: set[str]) -> str:
    """Return one line for an invalid value, which begins with its origin: the file, or the command line."""
    name = ".".join(str(part) for part in error["loc"] if part != "[key]" and not isinstance(part, int))
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "expected", 1)
    origin = "command line" if any(f"{key}.".startswith(f"{name}.") for key in given) else where
    found = "" if isinstance(error["input"], dict) else f", found {_brief(error['input'])}"  # a section has many keys
    return f"{origin}: {name or 'recipe'}: {message}{found}"


def recipe_yaml(recipe: Recipe) -> str:
    """Return a recipe as YAML with all values and the descriptions of its keys. `load_recipe` reads it back."""
    head = "# precision: auto was replaced by the dtype that is faster on this machine."
    return "".join(f"{line}\n" for line in (head, *_yaml_lines(recipe)))


def _yaml_lines(section: Section, indent: str = "") -> Iterator[str]:
    values = section.model_dump(mode="json")
    named = section.named_keys() if isinstance(section, EvaluationSection) else set()
    for name, field in type(section).model_fields.items():
        inner = getattr(section, name)
        # So that another preset or protocol can be chosen in this file.
        off = "# of the preset or protocol: " if name in named else ""
        if isinstance(inner, Section):
            yield f"{indent}{off}{name}:"
            yield from (f"{indent}{off}{line}" for line in _yaml_lines(inner, "  "))
        else:
            dumped = yaml.safe_dump(values[name], default_flow_style=True, allow_unicode=True, width=10**6)
            comment = "" if field.description is None else f"  # {field.description}"
            yield f"{indent}{off}{name}: {dumped.splitlines()[0]}{comment}"


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _read_layers(name_or_file: str, seen: tuple[str, ...] = ()) -> tuple[list[dict[str, Any]], str]:
    """Return the recipes that a recipe extends, then the recipe, and its origin. Files are relative to the recipe.

    Raises:
        UsageError: `extends` does not name another recipe.
    """
    raw, where = _read_source(name_or_file)
    base_name = raw.pop("extends", None)
    if base_name is None:
        return [raw], where
    if base_name in seen or not isinstance(base_name, str):
        raise UsageError(f"{where}: extends: expected another recipe, found {base_name!r}.")
    if Path(base_name).suffix in YAML_SUFFIXES:
        base_name = str(Path(name_or_file).parent / base_name)
    base, _ = _read_layers(base_name, (*seen, base_name))
    return [*base, raw], where


def _merged(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the layers merged, later ones over earlier ones.

    The last preset that is named begins with its layer, and the last protocol too.
    """
    last = {
        key: max((i for i, layer in enumerate(layers) if key in (layer.get("evaluation") or {})), default=None)
        for key in ("preset", "protocol")
    }
    merged: dict[str, Any] = {}
    for i, layer in enumerate(layers):
        for key in last:
            if i == last[key]:
                merged = _merge(merged, {"evaluation": _named_values(key, layer["evaluation"])})
        merged = _merge(merged, layer)
    return merged


def _named_values(key: str, evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return the values of the preset or protocol that a section names; none for an unknown name, refused later."""
    name = evaluation.get(key)
    if key == "preset":
        return preset_values(name) if name in PRESETS else {}
    return protocol_values(name) if name in PROTOCOLS else {}


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        merged[key] = _merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def _read_source(name_or_file: str) -> tuple[dict[str, Any], str]:
    builtin = resources.files("svgpipe.manifests").joinpath("recipes", f"{name_or_file}.yaml")
    path = Path(name_or_file)
    if path.suffix in YAML_SUFFIXES:
        if not path.is_file():
            raise UsageError(f"{path}: expected a recipe file, found none.")
        text, where = path.read_text(errors="replace"), str(path)
    elif "/" not in name_or_file and builtin.is_file():
        text, where = builtin.read_text(), f"recipe {name_or_file}"
    else:
        names = builtin_names()
        near = difflib.get_close_matches(name_or_file, names, 1, 0.3)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UsageError(f"recipe {name_or_file!r}: expected one of {', '.join(names)} or a .yaml file.{hint}")
    raw = parse_yaml(text, where)
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise UsageError(f"{where}: expected sections with keys, found {type(raw).__name__}.")
    return raw, where


def _apply_override(raw: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator or not name:
        raise UsageError(f"--set {override!r}: expected section.key=value, for example diffusion.steps=1000.")
    value = parse_value(text, f"--set {override!r}")
    target = raw
    *sections, key = name.split(".")
    for section in sections:
        inner = target.get(section) or {}
        if not isinstance(inner, dict):
            raise UsageError(f"--set {override!r}: {section} is a value, not a section.")
        # Copied, because a YAML alias (`a: &x {…}`, `b: *x`) makes two sections one object.
        copy = dict(inner)
        target[section] = copy
        target = copy
    target[key] = value


def _refuse_unknown_keys(raw: dict[str, Any], model: type[BaseModel], where: str, prefix: str = "") -> None:
    for key, value in raw.items():
        field = model.model_fields.get(key) if isinstance(key, str) else None
        if field is None:
            names = list(model.model_fields)
            near = difflib.get_close_matches(str(key), names, 1, 0.5)
            deeper = [f"{section}.{key}" for section in names if key in _keys_of(model, section)]
            if f"{prefix}{key}" in MOVED:
                hint = f"it is {MOVED[f'{prefix}{key}']} now."
            elif deeper:
                hint = f"did you mean {' or '.join(deeper)}?"
            else:
                hint = f"did you mean {prefix}{near[0]}?" if near else f"expected one of {', '.join(names)}."
            raise UsageError(f"{where}: unknown key {prefix}{key}; {hint}")
        inner = _section_of(field.annotation)
        if inner is not None and (value is not None or inner is field.annotation):
            if not isinstance(value, dict):
                raise UsageError(f"{where}: {prefix}{key}: expected a section with keys, found {_brief(value)}.")
            _refuse_unknown_keys(value, inner, where, f"{prefix}{key}.")


def _keys_of(model: type[BaseModel], name: str) -> set[str]:
    """Return the keys of a section; none if the field is a value."""
    section = _section_of(model.model_fields[name].annotation)
    return set() if section is None else set(section.model_fields)


def _section_of(annotation: object) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if typing.get_origin(annotation) in (Union, types.UnionType):
        for option in typing.get_args(annotation):
            if (section := _section_of(option)) is not None:
                return section
    return None
