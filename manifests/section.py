"""Base class of the sections of a recipe, ranges of their values, and how text or YAML becomes typed fields."""

from __future__ import annotations

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator


def _shift(value: object) -> object:
    if value != "from-dimension" and not (isinstance(value, int | float) and value > 0):
        raise ValueError("expected a number above 0, or from-dimension")
    return value


Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
TimeShift = Annotated[float | Literal["from-dimension"], BeforeValidator(_shift)]


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys are errors, values are never converted to another type."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: ValidationInfo) -> Any:
        """Return the value; a single value of a list as a list. pydantic would read true as 1, and a text as a number.

        Raises:
            ValueError: it is of another type than the field.
        """
        annotation = cls.model_fields[str(info.field_name)].annotation
        kinds, is_list = _kinds(annotation), _is_list(annotation)
        values = value if isinstance(value, list | tuple) else [value]
        for one in values:
            if isinstance(one, bool) and bool not in kinds:
                raise ValueError(f"expected {_named(kinds)}")
            if isinstance(one, str) and str not in kinds:
                brackets = f" (several in brackets: [{one}])" if is_list and "," in one else ""
                raise ValueError(f"expected {_named(kinds)}{brackets}")
            if isinstance(one, int | float) and not isinstance(one, bool) and not kinds & {int, float}:
                raise ValueError(f"expected {_named(kinds)}")
        return values if is_list and value is not None else value


def _kinds(annotation: Any) -> set[Any]:
    """Return the types of the single values of a field: bool, int, float, str, a section."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return {type(argument) for argument in arguments}
    if origin is Annotated:
        return _kinds(arguments[0])
    if origin in (Union, types.UnionType, tuple):
        return set().union(*(_kinds(argument) for argument in arguments if argument is not Ellipsis))
    return {annotation}


def _is_list(annotation: Any) -> bool:
    if get_origin(annotation) in (Union, types.UnionType):
        return any(_is_list(argument) for argument in get_args(annotation))
    return get_origin(annotation) is tuple


def _named(kinds: set[Any]) -> str:
    """Return what a field holds, for a message."""
    if kinds & {int, float}:
        return "a number"
    if bool in kinds:
        return "true or false"
    return "a text" if str in kinds else "keys with values"
