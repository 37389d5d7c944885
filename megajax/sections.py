"""What every configuration section is: a frozen, hashable record that checks itself when it is built.

Knows pydantic and nothing of what is configured: a section stands beside the code that it is for.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from megajax.errors import ConfigError

__all__ = ["Section", "one_of"]


class Section(BaseModel):
    """Base of all sections. Fields are checked by their annotations, then by `check`.

    Strings become what the annotation asks for, so that the command line can pass what it was given.

    Raises:
        ConfigError: a field is unknown, or a value cannot work; one line that names the field.

    Example:
        >>> class Tea(Section):
        ...     section = "tea"
        ...     minutes: int = 3
        >>> Tea(minutes="5")
        Tea(minutes=5)
        >>> Tea(minutes="long")
        Traceback (most recent call last):
        ...
        megajax.errors.ConfigError: tea.minutes is 'long': int is needed
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)
    section: ClassVar[str] = ""

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ConfigError(_describe(type(self), error)) from None
        self.check()

    def check(self) -> None:
        """Raises ConfigError where fields that are right by themselves cannot work together."""

    def require(self, ok: bool, name: str, why: str) -> None:
        """Raises ConfigError about a field, unless all is well."""
        if not ok:
            raise ConfigError(f"{_full_name(type(self), name)} is {getattr(self, name)!r}: {why}")

    def replace(self, **changes: Any) -> typing.Self:
        """The section with some fields changed, checked anew.

        Example:
            >>> class Tea(Section):
            ...     minutes: int = 3
            >>> Tea().replace(minutes=4)
            Tea(minutes=4)
        """
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self)(**(fields | changes))


def one_of(choices: Iterable[str] | Callable[[], Iterable[str]]) -> Any:
    """The check that a string is one of a registry's names, for `Annotated[str, one_of(REGISTRY)]`.

    Example:
        >>> class Tea(Section):
        ...     section = "tea"
        ...     kind: typing.Annotated[str, one_of({"green": 1, "black": 2})] = "green"
        >>> Tea(kind="red")
        Traceback (most recent call last):
        ...
        megajax.errors.ConfigError: tea.kind is 'red': choose one of green, black
    """

    def check(value: str) -> str:
        if value not in (names := list(choices() if callable(choices) else choices)):
            raise ValueError(f"choose one of {', '.join(names)}")
        return value

    return AfterValidator(check)


def _full_name(kind: type[Section], name: str) -> str:
    return f"{kind.section}.{name}" if kind.section else name


def _describe(kind: type[Section], error: ValidationError) -> str:
    """One line about the first field that is wrong."""
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        fields = ", ".join(kind.model_fields)
        return f"{_full_name(kind, name)}: there is no such field; the fields are {fields}"
    same = [one for one in error.errors() if one["loc"] and one["loc"][0] == name]
    reasons = {"value_error": "error", "greater_than_equal": "ge", "less_than_equal": "le"}
    ours = [one for one in same if one["type"] in reasons]
    if ours and ours[0]["type"] == "value_error":
        why = str(ours[0]["ctx"]["error"])
    elif ours:
        low = ours[0]["type"] == "greater_than_equal"
        limit = ours[0]["ctx"][reasons[ours[0]["type"]]]
        why = f"it must be at {'least' if low else 'most'} {limit}"
    else:
        why = f"{_kinds(kind.model_fields[name].annotation)} is needed"
    return f"{_full_name(kind, name)} is {first['input']!r}: {why}"


def _kinds(annotation: Any) -> str:
    """An annotation in words: `int | None` is `int or None`."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _kinds(inner[0])
    if origin is typing.Literal:
        return " or ".join(map(repr, inner))
    if annotation is type(None):
        return "None"
    if (
        origin is not None
        and not isinstance(origin, type)
        or str(origin) == "<class 'types.UnionType'>"
    ):
        return " or ".join(map(_kinds, inner))
    if origin is not None:
        return (
            "a function" if "Callable" in str(origin) else str(getattr(origin, "__name__", origin))
        )
    return str(getattr(annotation, "__name__", annotation))
