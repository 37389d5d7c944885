"""The orders of modules are all those that obey the rules and no others: by trying all of them."""

import itertools
import re

import numpy as np
import pytest

from megajax.formats.ordering import orders


def stem(name):
    return re.sub(r"\d+", "#", name)


def children(name):
    """The modules around a name, and what it is called in each."""
    parts = name.split(".")
    return [(".".join(parts[:depth]), parts[depth]) for depth in range(len(parts))]


def obeys(order):
    """Numbers rise, modules are used as a whole, and alike modules in the same order."""
    places: dict = {}
    for place, name in enumerate(order):
        for outer, inner in children(name):
            places.setdefault(outer, {}).setdefault(inner, []).append(place)
    first_of: dict = {}
    for outer, inside in places.items():
        for used in inside.values():
            if used != list(range(used[0], used[-1] + 1)):
                return False
        for (a, at_a), (b, at_b) in itertools.permutations(inside.items(), 2):
            numbers = [[int(n) for n in re.findall(r"\d+", name)] for name in (a, b)]
            if stem(a) == stem(b):
                if (numbers[0] < numbers[1]) != (at_a < at_b):
                    return False
            elif first_of.setdefault((stem(outer), a, b), at_a < at_b) != (at_a < at_b):
                return False
    return True


@pytest.mark.parametrize("seed", range(25))
def test_all_orders_are_found_and_no_others(seed):
    rng = np.random.default_rng(seed)
    inner = ["a", "b", "c1", "c2", "0"]
    names = {f"{rng.choice(['x', 'l1', 'l2'])}.{rng.choice(inner)}" for _ in range(6)}
    names |= {str(name) for name in rng.choice(["p", "q1", "q2"], size=2)}
    names = sorted(names)[-6:]
    kind = {name: rng.integers(2) for name in names}
    lawful = [order for order in itertools.permutations(names) if obeys(order)]
    program = [kind[name] for name in lawful[rng.integers(len(lawful))]]
    expected = [order for order in lawful if [kind[name] for name in order] == program]
    found, complete = orders(names, lambda i, name: kind[name] == program[i], most=10**6)
    assert complete
    assert sorted(found) == sorted(expected)


def blocks(stages, channels=lambda stage: stage):
    """A ResNet in torchvision's names: kind of each module, in the order of the program."""
    kinds = {"conv1": ("conv", -1, 0), "bn1": ("norm", channels(0))}
    for stage, count in enumerate(stages):
        for i in range(count):
            name, width = f"layer{stage + 1}.{i}", channels(stage)
            before = channels(stage - 1) if stage and not i else width
            kinds[f"{name}.conv1"] = ("conv", before, width)
            kinds[f"{name}.bn1"] = ("norm", width)
            kinds[f"{name}.conv2"] = ("conv", width, width)
            kinds[f"{name}.bn2"] = ("norm", width)
            if before != width:
                kinds[f"{name}.downsample.0"] = ("conv1x1", before, width)
                kinds[f"{name}.downsample.1"] = ("norm", width)
    return kinds | {"fc": ("linear",)}


def solve(kinds):
    program = list(kinds.values())
    return orders(sorted(kinds), lambda place, name: kinds[name] == program[place])


@pytest.mark.parametrize("stages", [(2, 2, 2, 2), (3, 8, 36, 3)])
def test_a_resnet_has_one_order(stages):
    """Norms before or after their convolutions fit the first stage alike; the second tells."""
    kinds = blocks(stages)
    assert solve(kinds) == ([tuple(kinds)], True)


def test_a_resnet_of_one_width_has_two_and_both_are_found():
    kinds = blocks((2,), channels=lambda stage: 0)
    found, complete = solve(kinds)
    assert complete
    assert tuple(kinds) in found
    assert {order[1] for order in found} == {"bn1", "layer1.0.bn1"}


def test_lists_of_layers_side_by_side_are_interleaved_by_their_numbers():
    kinds = {}
    for i in range(12):
        kinds[f"convs.{i}"], kinds[f"norms.{i}"] = "conv", "norm"
    assert solve(kinds) == ([tuple(kinds)], True)


def test_a_search_without_end_is_given_up():
    kinds = dict.fromkeys(itertools.product("abcdefgh", repeat=1), "x")
    names = ["".join(name) for name in kinds]
    found, complete = orders(names, lambda place, name: place < 7 or name > "z")
    assert (found, complete) == ([], True)
    many = [f"{letter}x" for letter in "abcdefghijklmnopqrst"]
    assert orders(many, lambda place, name: place < 19) == ([], False)
