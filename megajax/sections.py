"""What every configuration section is: a frozen, hashable record that checks itself when built.

Knows pydantic and nothing of what is configured: a section stands beside the code that it is for.
A value may come from Python, from JSON or as text from the command line; what a text stands for
follows from the annotation of its field.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, NamedTuple, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from megajax.errors import ConfigError, did_you_mean

__all__ = [
    "Field",
    "Fraction",
    "Pattern",
    "Place",
    "Section",
    "at_least",
    "between",
    "fields",
    "literal",
    "one_of",
]

_SETTINGS = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True)


class Section(BaseModel):
    """Base of all sections. Fields are checked by their annotations, then by `_check`.

    Lists become tuples and NumPy's scalars Python's. A text becomes what the field's annotation
    asks for, so that the command line can pass on what it was given.

    Raises:
        ConfigError: a field is unknown, or a value cannot work; one line that names the field.

    Example:
        >>> class Tea(Section):
        ...     section = "tea"
        ...     minutes: int | None = 3
        >>> Tea(minutes="5"), Tea(minutes="None")
        (Tea(minutes=5), Tea(minutes=None))
        >>> Tea(minutes="long")
        Traceback (most recent call last):
        ...
        megajax.errors.ConfigError: tea.minutes is 'long': a whole number or None is needed
        >>> Tea(minuets=5)
        Traceback (most recent call last):
        ...
        megajax.errors.ConfigError: tea.minuets is not a field of the configuration; did you mean
        tea.minutes?
    """

    model_config = _SETTINGS
    section: ClassVar[str] = ""

    def __init__(self, /, **values: Any) -> None:
        kind = type(self)
        given = {name: _read(kind, name, value) for name, value in values.items()}
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise ConfigError(_complaint(kind, given, error)) from None
        self._check()

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"sections are frozen: use replace({name}=...), which makes another")

    def __hash__(self) -> int:
        values = (getattr(self, name) for name in type(self).model_fields)
        return hash(tuple(frozenset(v.items()) if isinstance(v, dict) else v for v in values))

    def _check(self) -> None:
        """Raises ConfigError where fields that are right by themselves cannot work together."""

    def require(self, ok: bool, name: str, why: str) -> None:
        """Raises ConfigError about a field, unless all is well."""
        if not ok:
            raise ConfigError(f"{_full(type(self), name)} is {getattr(self, name)!r}: {why}")

    def replace(self, **changes: Any) -> Self:
        """The section with some fields changed, checked anew; a section in it by a mapping.

        Example:
            >>> class Tea(Section):
            ...     minutes: int = 3
            >>> Tea().replace(minutes=4)
            Tea(minutes=4)
        """
        values = {name: getattr(self, name) for name in type(self).model_fields}
        for name, change in changes.items():
            inner = isinstance(values.get(name), Section) and isinstance(change, Mapping)
            values[name] = values[name].replace(**change) if inner else change
        return type(self)(**values)


def one_of(choices: Iterable[str], *words: str) -> Any:
    """Checks that a string is a name in a registry; for use in `Annotated[str, ...]`.

    The registry is asked when a section is built, so that an entry may be added at any time.

    Args:
        choices: the registry.
        words: other strings that are allowed.

    Example:
        >>> class Tea(Section):
        ...     section = "tea"
        ...     kind: Annotated[str, one_of({"green": 1, "black": 2}, "any")] = "any"
        >>> Tea(kind="red")
        Traceback (most recent call last):
        ...
        megajax.errors.ConfigError: tea.kind is 'red': choose one of any, green, black
    """

    def names() -> list[str]:
        return [*words, *choices]

    def check(value: str) -> str:
        if value not in names():
            raise ValueError(f"choose one of {', '.join(names())}")
        return value

    check.choices = names  # type: ignore[attr-defined]
    return AfterValidator(check)


def at_least(low: float) -> Any:
    """Checks that a number is not below another; for use in `Annotated`."""
    return _must(lambda value: value >= low, f"it must be at least {low}")


def between(low: float, high: float) -> Any:
    """Checks that a number lies between two others or is one of them; for use in `Annotated`."""
    return _must(lambda value: low <= value <= high, f"it must lie between {low} and {high}")


def _must(hold: Callable[[float], bool], why: str) -> Any:
    def check(value: float) -> float:
        if not hold(value):
            raise ValueError(why)
        return value

    return AfterValidator(check)


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    return pattern


Fraction = Annotated[float, between(0, 1)]
"""A number between 0 and 1."""

Pattern = Annotated[str, AfterValidator(_compiles)]
"""A regular expression."""

Place = Annotated[str, AfterValidator(os.path.expanduser)]
"""A file or folder; `~` is the user's home."""


class Field(NamedTuple):
    """What a field of a section is.

    Attributes:
        name: with its section's, as in `evolution.generations`.
        kind: what it takes, in words.
        default: its default.
        meaning: from the docstring of its section.
    """

    name: str
    kind: str
    default: Any
    meaning: str


def fields(kind: type[Section]) -> Iterator[Field]:
    """The fields of a section and of those in it.

    Example:
        >>> class Tea(Section):
        ...     '''Tea.
        ...
        ...     Attributes:
        ...         minutes: how long
        ...             it draws.
        ...     '''
        ...     section = "tea"
        ...     minutes: int = 3
        >>> list(fields(Tea))
        [Field(name='tea.minutes', kind='a whole number', default=3, meaning='how long it draws.')]
    """
    _, _, attributes = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")
    parts = re.findall(r"^    (\w+): ((?:.|\n(?=     ))*)", attributes, flags=re.MULTILINE)
    meanings = {name: " ".join(text.split()) for name, text in parts}
    for name, field in kind.model_fields.items():
        inner = _section_of(field)
        if inner is not None:
            yield from fields(inner)
        else:
            words = _words(field.rebuild_annotation())
            yield Field(_full(kind, name), words, field.default, meanings.get(name, ""))


def _read(kind: type[Section], name: str, value: Any) -> Any:
    """A value as the field takes it, if it can; otherwise pydantic will say what is wrong."""
    if name not in kind.model_fields:
        there, section = f"there are {', '.join(kind.model_fields)}", _full(kind, "")
        hint = did_you_mean(name, kind.model_fields, there, section)
        raise ConfigError(f"{_full(kind, name)} is not a field of the configuration; {hint}")
    field = kind.model_fields[name]
    if (inner := _section_of(field)) is not None:
        if isinstance(value, Mapping):
            return inner(**{str(key): item for key, item in value.items()})
        if not isinstance(value, Section):
            raise ConfigError(f"{_full(kind, name)} is {value!r}: it is a section with fields")
    if not isinstance(value, str):
        return _plain(value)
    adapter = TypeAdapter(field.rebuild_annotation(), config=ConfigDict(strict=True))
    refused = []
    for meaning in _meanings(value):
        try:
            adapter.validate_python(meaning)
        except ValidationError as error:
            refused += [meaning] if _reasons(error.errors()) else []
        else:
            return meaning
    return refused[0] if refused else value


def literal(text: str) -> Any:
    """What a text stands for by itself, where no annotation says it.

    Example:
        >>> literal("32"), literal("(1, 2)"), literal("same")
        (32, (1, 2), 'same')
    """
    return next(_meanings(text))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return tuple(map(_plain, value))
    return value.item() if getattr(value, "shape", None) == () else value


def _meanings(text: str) -> Iterator[Any]:
    """All that a text may stand for, the more special first; a list of one needs no brackets."""
    literals = [text == "true"] if text in ("true", "false") else []
    with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
        literals.append(_plain(ast.literal_eval(text)))
    yield from literals
    if "," in text:
        yield tuple(part.strip() for part in text.split(",") if part.strip())
    yield text
    yield from ((literal,) for literal in literals)
    yield (text,) if text else ()


def _complaint(kind: type[Section], given: Mapping[str, Any], error: ValidationError) -> str:
    """One line about the first field that is wrong."""
    details: list[Any] = error.errors()
    name = str(details[0]["loc"][0])
    reasons = _reasons(one for one in details if one["loc"][0] == name)
    needed = f"{_words(kind.model_fields[name].rebuild_annotation())} is needed"
    why = next(iter(reasons), needed)
    return " ".join(f"{_full(kind, name)} is {given[name]!r}: {why}".splitlines())


def _reasons(details: Iterable[Any]) -> list[str]:
    """What the checks above say about values of the right type."""
    return [str(one["ctx"]["error"]) for one in details if one["type"] == "value_error"]


def _section_of(field: FieldInfo) -> type[Section] | None:
    kind: Any = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _full(kind: type[Section], name: str) -> str:
    return f"{kind.section}.{name}" if kind.section else name


def _words(annotation: Any) -> str:
    """An annotation in words: `int | None` is `a whole number or None`."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        choices = [getattr(getattr(check, "func", None), "choices", None) for check in inner[1:]]
        named = [_either(choice()) for choice in choices if choice is not None]
        return named[0] if named else _words(inner[0])
    if origin is typing.Literal:
        return _either(inner)
    if origin in (typing.Union, types.UnionType):
        first, *parts = map(_words, inner)
        again = [one.endswith(", ...)") and first.endswith(one[1:-6]) for one in parts]
        rest = ("several of them" if a else one for one, a in zip(parts, again, strict=True))
        return " or ".join([first, *rest])
    if origin is tuple:
        return f"({', '.join('...' if one is Ellipsis else _words(one) for one in inner)})"
    names = {
        int: "a whole number",
        float: "a number",
        bool: "True or False",
        str: "a text",
        type(None): "None",
        Callable: "a function",
        Mapping: "a dictionary",
    }
    name = getattr(annotation, "__name__", str(annotation))
    return names.get(origin or annotation, f"a {name}")


def _either(choices: Iterable[Any]) -> str:
    """Choices in words: `'a', 'b' or 'c'`."""
    *most, last = map(repr, choices)
    return f"{', '.join(most)} or {last}" if most else last
