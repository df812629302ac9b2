"""The fields of a configuration: their types, and the decorator that makes a class a section which checks them."""

import dataclasses
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast, dataclass_transform

import pydantic
from pydantic import Field
from pydantic_core import PydanticCustomError

T = TypeVar("T")

PACKAGE = Path(str(resources.files("tfm_jax")))
WAN_TINY = Path("wan_tiny")
"""As the value of `model.path`, this selects the embedded model. An existing file or folder of that name takes
precedence."""

_strict = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,))
def section(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass that checks its values; the docstring below a field is the help of the field."""
    made: Any = pydantic.dataclasses.dataclass(frozen=True, config=_strict, kw_only=True)(cls)
    # pydantic ignores the docstrings of inherited fields.
    for base in filter(pydantic.dataclasses.is_pydantic_dataclass, cls.__mro__[1:]):
        for name, field in base.__pydantic_fields__.items():
            made.__pydantic_fields__[name].description = field.description
    return cast(type[T], made)


def _not_empty(value: Any) -> Any:
    if value == "":  # Path("") is the current directory
        raise PydanticCustomError("path_type", "expected a path")
    return value


def _find_model(path: Path) -> Path:
    return PACKAGE / "moving_shapes" / "wan_tiny" if path == WAN_TINY and not path.exists() else path


def _name_model(path: Path) -> str:
    return str(WAN_TINY if path == _find_model(WAN_TINY) else path)


def _list_of_buckets(value: Any, check: Callable[[Any], Any]) -> Any:
    try:
        return check(value)
    except pydantic.ValidationError:
        example = "[[81, 480, 832], [81, 832, 480]]"
        raise PydanticCustomError("buckets", f"expected a list of [frames, height, width], such as {example}") from None


def _mapping_of_ranks(value: Any, check: Callable[[Any], Any]) -> Any:
    try:
        return check(value)
    except pydantic.ValidationError:
        raise PydanticCustomError("ranks", "expected a rank for each target, such as {q: 16, ffn.0: 64}") from None


Buckets = Annotated[tuple[tuple[int, ...], ...], pydantic.WrapValidator(_list_of_buckets)]
Ranks = Annotated[dict[str, Annotated[int, Field(ge=1)]], pydantic.WrapValidator(_mapping_of_ranks)]
NonEmptyPath = Annotated[Path, pydantic.BeforeValidator(_not_empty)]
ModelPath = Annotated[NonEmptyPath, pydantic.AfterValidator(_find_model), pydantic.PlainSerializer(_name_model)]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Rate = Annotated[float, Field(gt=0)] | Literal["native"]
Remat = Literal["full", "attention", "attention_offload", "none"]
Solver = Literal["euler", "unipc", "dpmpp_2m"]


def require(holds: bool, field: str, value: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"{field}={value}: expected {expected}")
