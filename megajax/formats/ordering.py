"""Puts the modules of a state dict into the order of a program, by their names' structure alone.

Knows dotted names and which of them may stand at which place, and nothing of arrays. A state dict
has no order of its own (safetensors sorts it), but its names have: `layer1` comes before `layer2`
and `0` before `1`; what is inside one module is used together; and modules whose names differ in
numbers only (`layer1.0`, `layer2.1`) use what they are made of in the same order. What else comes
before what is found out by trying.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

__all__ = ["orders"]

Fits: TypeAlias = Callable[[int, str], bool]
"""`fits(place, name)`: whether a module may stand at a place of the program."""

_MAX_STEPS = 200_000


def orders(names: Sequence[str], fits: Fits, most: int = 16) -> tuple[list[tuple[str, ...]], bool]:
    """The orders of modules that fit a program.

    First those in which every module is used as a whole before the next one; if there are none,
    those that only keep to the numbers.

    Args:
        names: dotted names of the modules, as many as the program has places.
        fits: `fits(place, name)`.
        most: stop after so many.

    Returns:
        The orders (tuples of the names), and whether these are all there are.

    Example:
        >>> kinds = {"stem": "conv", "bn": "norm", "body.1": "conv", "body.0": "conv"}
        >>> program = ["conv", "norm", "conv", "conv"]
        >>> orders(list(kinds), lambda place, name: kinds[name] == program[place])
        ([('stem', 'bn', 'body.0', 'body.1')], True)
    """
    for whole in (True, False):
        found: list[tuple[str, ...]] = []
        for steps, order in enumerate(_search(names, fits, whole), start=1):
            if order is not None:
                found.append(order)
            if len(found) == most or steps == _MAX_STEPS:
                return found, False
        if found:
            return found, True
    return [], True


def _search(names: Sequence[str], fits: Fits, whole: bool) -> Iterator[tuple[str, ...] | None]:
    """Orders that keep to the numbers and, if `whole`, to the modules; None for each step.

    That `a` comes before `b` in one module is then remembered for all modules of the same pattern.
    Sets of names are the bits of a number, because there are many steps.
    """
    paths = [_components(name, names) for name in names]
    earlier = [sum(1 << j for j, other in enumerate(paths) if _precedes(other, p)) for p in paths]
    inside: dict[str, dict[str, int]] = {}  # module -> what it holds -> the names in there
    for i, path in enumerate(paths):
        for depth, part in enumerate(path):
            held = inside.setdefault(".".join(path[:depth]), {})
            held[part] = held.get(part, 0) | 1 << i
    within = {outer: sum(held.values()) for outer, held in inside.items()}
    pattern = {outer: _number(outer)[0] for outer in inside}
    alike = Counter(pattern.values())

    stack: list[tuple[tuple[int, ...], int, frozenset[tuple[str, str, str]]]]
    stack = [((), (1 << len(names)) - 1, frozenset())]
    while stack:
        chosen, left, known = stack.pop()
        yield None if left else tuple(names[i] for i in chosen)
        last = paths[chosen[-1]] if whole and chosen else ()
        modules = (".".join(last[:depth]) for depth in reversed(range(len(last))))
        scope = next((outer for outer in modules if within[outer] & left), "")
        open_names = left & within[scope]
        ways = []
        for i, path in enumerate(paths):
            if not open_names >> i & 1 or earlier[i] & left or not fits(len(chosen), names[i]):
                continue
            new = set()
            for depth, part in enumerate(path) if whole else ():
                outer = ".".join(path[:depth])
                if alike[pattern[outer]] > 1 and len(outer) >= len(scope):
                    others = [o for o, held in inside[outer].items() if o != part and held & left]
                    new |= {(pattern[outer], part, other) for other in others}
            if not any((outer, b, a) in known for outer, a, b in new):
                ways.append(((*chosen, i), left & ~(1 << i), known | new))
        stack += reversed(ways)


def _components(name: str, names: Sequence[str]) -> tuple[str, ...]:
    """The parts of a dotted name; what a module that holds others has itself is called ``."""
    holds = any(other.startswith(f"{name}.") for other in names)
    return (*name.split("."), *([""] if holds else []))


@functools.cache
def _number(part: str) -> tuple[str, tuple[int, ...]]:
    """What a name is without its numbers, and these.

    >>> _number("conv1_2")
    ('conv#_#', (1, 2))
    """
    return re.sub(r"\d+", "#", part), tuple(int(n) for n in re.findall(r"\d+", part))


def _precedes(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether the first parts that differ do so in their numbers only, and which are the smaller.

    >>> _precedes(["layer1", "1"], ["layer2", "0"]), _precedes(["conv1"], ["bn2"])
    (True, False)
    """
    a, b = next((pair for pair in zip(one, other, strict=False) if pair[0] != pair[1]), ("", ""))
    (stem, numbers), (other_stem, other_numbers) = _number(a), _number(b)
    return stem == other_stem and numbers < other_numbers
