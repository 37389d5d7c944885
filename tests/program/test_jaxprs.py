"""Walking a program: the delayed run computes what the program computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from megajax.formats.adapters import from_linen
from megajax.program.jaxprs import delay, trace, walk
from megajax.zoo import networks as models

X = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint])
def test_a_delayed_run_is_the_network(wrap):
    model = models.build("resnet", 5, {"depth": 8, "width": 4})
    variables = jax.jit(model.init)(jax.random.key(1), X)
    apply_fn = wrap(from_linen(model, {}, train=False).apply_fn)
    program = trace(apply_fn, variables, X)
    numbers = []

    def visit(number, equation, operands):
        numbers.append(number)
        return delay(equation, operands)

    arguments = [lambda leaf=leaf: leaf for leaf in [*jax.tree.leaves(variables), X]]
    (logits,) = walk(program.closed, arguments, visit, lambda constant: lambda: constant)
    np.testing.assert_allclose(logits(), apply_fn(variables, X), rtol=1e-4, atol=1e-5)
    assert numbers == list(range(len(numbers)))


def test_what_nobody_asks_for_is_not_computed():
    computed = []

    def spied(x):
        jax.debug.callback(lambda: computed.append(1))
        return x

    program = trace(lambda w, x: (jnp.sin(x), spied(w))[0], jnp.ones(2), jnp.ones(2))
    arguments = [lambda: 1 / 0, lambda: jnp.ones(2)]  # the first is never read

    def visit(number, equation, operands):
        return delay(equation, operands)

    (output,) = walk(program.closed, arguments, visit, lambda constant: lambda: constant)
    np.testing.assert_allclose(output(), np.sin(1), rtol=1e-6)
    assert not computed
