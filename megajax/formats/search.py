"""Puts the modules of a state dict into the order of a program, by their names' structure alone.

Knows dotted names and which of them may stand at which place, and nothing of arrays. A state dict
has no order of its own (safetensors sorts it), but its names have: `layer1` comes before `layer2`
and `0` before `1`; what is inside one module is used together; and modules whose names differ in
numbers only (`layer1.0`, `layer2.1`) use what they are made of in the same order. What else comes
before what is found out by trying.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

__all__ = ["orders"]

Fits = Callable[[int, str], bool]
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
    for search in (_by_module, _by_number):
        found: list[tuple[str, ...]] = []
        for steps, order in enumerate(search(names, fits), start=1):
            if order is not None:
                found.append(order)
            if len(found) == most or steps == _MAX_STEPS:
                return found, False
        if found:
            return found, True
    return [], True


def _number(component: str) -> tuple[str, tuple[int, ...]]:
    """What a name is without its numbers, and these.

    >>> _number("conv1_2")
    ('conv#_#', (1, 2))
    """
    return re.sub(r"\d+", "#", component), tuple(int(n) for n in re.findall(r"\d+", component))


class _Node(NamedTuple):
    """A module that holds others.

    Attributes:
        pattern: its name without numbers.
        queues: what it holds; within a queue the order is known, from the numbers.
    """

    pattern: str
    queues: tuple[tuple[str, ...], ...]


class _Frame(NamedTuple):
    """A module that is being used: what of it is left, and the module around it."""

    name: str
    left: tuple[tuple[str, ...], ...]
    outer: Any


def _tree(names: Sequence[str]) -> dict[str, _Node]:
    """Every module that holds others; a module's own tensors are its child `NAME.`."""
    children: dict[str, set[str]] = {"": set()}
    for name in names:
        parts = name.split(".")
        for depth in range(len(parts)):
            outer = ".".join(parts[:depth])
            children.setdefault(outer, set()).add(".".join(parts[: depth + 1]))
    for name in names:
        if name in children and name != "":
            children[name].add(f"{name}.")
    tree = {}
    for outer, inside in children.items():
        queues: dict[str, list[tuple[tuple[int, ...], str]]] = {}
        for name in inside:
            stem, numbers = _number(name.removeprefix(outer))
            queues.setdefault(stem, []).append((numbers, name))
        ordered = [tuple(name for _, name in sorted(queues[stem])) for stem in sorted(queues)]
        tree[outer] = _Node(_number(outer)[0], tuple(ordered))
    return tree


def _by_module(names: Sequence[str], fits: Fits) -> Iterator[tuple[str, ...] | None]:
    """Orders in which every module is used as a whole; None for each step of the search.

    That `a` comes before `b` in one module is remembered for all modules of the same pattern.
    """
    tree = _tree(names)
    patterns = Counter(node.pattern for node in tree.values())
    stack: list[tuple[Any, tuple[str, ...], frozenset[tuple[str, str, str]]]] = []
    stack.append((_Frame("", tree[""].queues, None), (), frozenset()))
    while stack:
        frame, chosen, known = stack.pop()
        while frame is not None and not frame.left:
            frame = frame.outer
        yield chosen if frame is None else None
        if frame is None:
            continue
        pattern = tree[frame.name].pattern
        remembers = patterns[pattern] > 1
        ways = []
        for i, queue in enumerate(frame.left):
            head, rest = queue[0], queue[1:]
            facts = known
            if remembers:
                place = len(frame.name)
                others = [n for j, other in enumerate(frame.left) if j != i for n in other]
                pairs = [(head[place:], other[place:]) for other in others]
                if any((pattern, b, a) in known for a, b in pairs):
                    continue
                new = {(pattern, a, b) for a, b in pairs}
                facts = known if new <= known else known | new
            left = frame.left[:i] + ((rest,) if rest else ()) + frame.left[i + 1 :]
            after = _Frame(frame.name, left, frame.outer)
            if head in tree:
                ways.append((_Frame(head, tree[head].queues, after), chosen, facts))
            else:
                name = head.removesuffix(".")
                if fits(len(chosen), name):
                    ways.append((after, (*chosen, name), facts))
        stack.extend(reversed(ways))


def _by_number(names: Sequence[str], fits: Fits) -> Iterator[tuple[str, ...] | None]:
    """Orders that keep to the numbers; None for each step of the search."""
    before = [0] * len(names)  # as bits: the modules that come before
    parts = [[(part, *_number(part)) for part in name.split(".")] for name in names]
    for i, one in enumerate(parts):
        for j, other in enumerate(parts):
            differ = next(
                (pair for pair in zip(one, other, strict=False) if pair[0] != pair[1]), None
            )
            if differ and differ[0][1] == differ[1][1] and differ[0][2] > differ[1][2]:
                before[i] |= 1 << j
    possible = [[i for i, name in enumerate(names) if fits(n, name)] for n in range(len(names))]
    stack: list[tuple[int, tuple[int, ...]]] = [(0, ())]
    while stack:
        used, chosen = stack.pop()
        done = len(chosen) == len(names)
        yield tuple(names[i] for i in chosen) if done else None
        if not done:
            stack += [
                (used | 1 << i, (*chosen, i))
                for i in reversed(possible[len(chosen)])
                if not used >> i & 1 and not before[i] & ~used
            ]
