"""JAX's versions: a primitive that is renamed, new or of another form is noticed, and survived."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from jax.extend.core import primitives

from megajax.alignment import find_symmetries, propagation, unit_labels
from megajax.program.jaxprs import CALLS, CONTRACTIONS, ELEMENTWISE, bodies, walk

# Names that not all supported versions of JAX have.
NOT_EVERYWHERE = {
    *("call", "closed_call", "core_call"),  # up to 0.10
    *("stack", "unstack"),  # from 0.10.1
    *("eval_jaxpr", "log2", "one_minus_square"),  # from 0.11
    "polynomial",  # from 0.12
    *("checkpoint", "pjit"),  # the names of `remat2` and `jit` before 0.10
}

# What may not be permuted, whatever it is given, and what no network's inference does.
NO_RULE = set(
    """
    after_all all_gather all_to_all approx_top_k axis_index bitcast_convert_type cholesky
    create_token custom_lin custom_linear_solve eig eigh empty2 fft get hessenberg
    householder_product igamma_grad_a lu pmax pmin ppermute psum qr ragged_all_to_all random_bits
    random_fold_in random_gamma random_seed random_split random_unwrap random_wrap reduce
    reduce_window rng_bit_generator rng_uniform scatter scatter-add scatter-max scatter-min
    scatter-mul schur select_and_gather_add select_and_scatter select_and_scatter_add svd swap
    threefry2x32 top_k triangular_solve tridiagonal tridiagonal_solve
    """.split()  # noqa: SIM905
)


def listed():
    """The names of the primitives that JAX lists."""
    values = (getattr(primitives, name) for name in dir(primitives) if name.endswith("_p"))
    return {value.name for value in values}


def test_every_primitive_that_jax_lists_is_known():
    known = CALLS | set(propagation.RULES) | NO_RULE
    assert listed() - known == set()


def test_every_name_that_is_known_is_a_primitive():
    everywhere = {one.name for one in gc.get_objects() if isinstance(one, core.Primitive)}
    names = {*CALLS, *CONTRACTIONS, *ELEMENTWISE, *propagation.RULES}
    assert names - everywhere <= NOT_EVERYWHERE
    assert not NO_RULE & names


def layers(w, x):
    """A loop over stacked layers, a branch, and a loop without an end that is known."""
    x, sums = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x.sum()), x, w["stacked"])
    x = jax.lax.cond(sums[0] > 0, lambda x: x, lambda x: 2 * x, x)
    x = jax.lax.while_loop(lambda x: jnp.abs(x).max() > 1, lambda x: x / 2, x)
    return x @ w["out"]


WEIGHTS = {"stacked": np.ones((4, 3, 3), np.float32), "out": np.ones((3, 2), np.float32)}
X = np.ones((5, 3), np.float32)


def test_what_loops_carry_and_slice_is_told_in_every_version():
    found = {}

    def visit(number, equation, operands):
        for body in bodies(equation):
            found.setdefault(equation.primitive.name, []).append(
                (len(body.operands), body.carried, body.sliced, len(body.closed.jaxpr.eqns))
            )
        return [None] * len(equation.outvars)

    closed = jax.make_jaxpr(lambda w, x: layers(w, x))(WEIGHTS, X)
    walk(closed, [None] * 3, visit, lambda constant: None)
    assert found["scan"] == [(2, 1, 1, 3)]
    assert [one[:3] for one in found["cond"]] == [(1, 0, 0)] * 2
    assert [one[:3] for one in found["while"]] == [(1, 1, 0)] * 2


@pytest.mark.parametrize("name", ["scan", "dot_general", "while", "cond", "reshape", "jit"])
def test_parameters_of_another_form_pin_what_they_touch_and_are_reported(name, monkeypatch):
    """Every equation of a kind comes with parameters that nobody has heard of."""

    def network(w, x):
        hidden = jax.jit(jnp.tanh)(x @ w["first"]).reshape(5, 1, 3)
        return jax.nn.relu(layers(w, hidden.reshape(5, 3)) @ w["more"]) @ w["last"]

    w = {**WEIGHTS, "first": np.ones((3, 3), np.float32), "more": np.ones((2, 4), np.float32)}
    w["last"] = np.ones((4, 2), np.float32)

    def renamed(equation):
        inner = [
            value.replace(eqns=[*map(renamed, value.eqns)])
            if isinstance(value, core.Jaxpr)
            else value
            for value in equation.params.values()
        ]
        params = dict(zip(equation.params, inner, strict=True))
        if equation.primitive.name == name:
            params = {f"new_{key}": value for key, value in params.items()}
        return equation.replace(params=params)

    make = jax.make_jaxpr

    def other(*args, **options):
        def wrapped(*values):
            closed, shape = make(*args, **options)(*values)
            jaxpr = closed.jaxpr.replace(eqns=[*map(renamed, closed.jaxpr.eqns)])
            return core.ClosedJaxpr(jaxpr, closed.consts), shape

        return wrapped

    assert name not in find_symmetries(network, w, X).unknown
    monkeypatch.setattr(jax, "make_jaxpr", other)
    found = find_symmetries(lambda w, x: network(w, x), w, X)
    assert found.unknown == (name,)
    assert any(pinned.reason == name for pinned in found.pinned)
    unit_labels(lambda w, x: network(w, x), w, X)


def test_a_primitive_that_nobody_knows_pins_what_it_touches(monkeypatch):
    monkeypatch.delitem(propagation.RULES, "tanh")
    found = find_symmetries(
        lambda w, x: jax.nn.relu(jnp.tanh(x @ w["a"]) @ w["b"]) @ w["c"],
        {"a": np.ones((3, 4)), "b": np.ones((4, 5)), "c": np.ones((5, 2))},
        X,
    )
    assert found.unknown == ("tanh",)
    assert [group.name for group in found.groups] == ["b"]
