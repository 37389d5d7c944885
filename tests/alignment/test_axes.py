"""Unification of axes against the permutations that they stand for."""

import itertools

import pytest

from megajax.alignment.axes import atom, boxes, concat, find, pin, product, split, unify


def shape(axis):
    axis = find(axis)
    return axis.size if axis.kind == "atom" else (axis.kind, *map(shape, axis.parts))


def test_products_are_refined_to_their_common_factors():
    left, right = product([atom(6), atom(4)]), product([atom(3), atom(8)])
    unify(left, right)
    assert [(o, [(a.size, s) for a, s in f]) for o, f in boxes(left)] == [
        (0, [(3, 8), (2, 4), (4, 1)])
    ]
    assert boxes(left) == boxes(right)


def test_concatenations_are_refined_to_their_common_segments():
    left, right = concat([atom(3), atom(5)]), concat([atom(4), atom(4)])
    unify(left, right)
    assert [(o, f[0][0].size) for o, f in boxes(left)] == [(0, 3), (3, 1), (4, 4)]
    assert boxes(left) == boxes(right)


def test_stacked_gates_and_concatenated_gates_are_one_group():
    gates = [atom(5) for _ in range(4)]
    unify(concat(gates), product([atom(4), hidden := atom(5)]))
    assert {find(gate) for gate in gates} == {find(hidden)}
    assert find(hidden).reason is None


def test_groups_of_concatenated_channels_stay_inside_their_segment():
    whole = concat([atom(4), atom(8)])
    groups, units = split(whole, (6, 2))
    assert shape(groups) == ("concat", 2, 4)
    assert shape(units) == 2


@pytest.mark.parametrize(
    "forms",
    [
        (product([atom(6), atom(4)]), product([atom(4), atom(6)])),
        (concat([atom(5), atom(7)]), product([atom(3), atom(4)])),
    ],
)
def test_forms_without_a_common_refinement_are_pinned(forms):
    unify(*forms)
    for axis in forms:
        assert all(a.reason for _, factors in boxes(axis) for a, _ in factors)


def test_what_is_pinned_stays_pinned_whatever_it_is_tied_to():
    makers = (
        lambda: atom(12),
        lambda: product([atom(3), atom(4)]),
        lambda: concat([atom(6), atom(6)]),
    )
    for make, other, late in itertools.product(makers, makers, (False, True)):
        a, b = make(), other()
        if not late:
            pin(a, "output")
        unify(a, b)
        if late:
            pin(a, "output")
        for _, factors in boxes(b):
            assert all(unit.reason for unit, _ in factors)
