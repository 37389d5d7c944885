"""What a program needs is compared with what its device says it has."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

import megajax as mj
from megajax.program.memory import check_fits


def device(**stats):
    return SimpleNamespace(device_kind="H100", id=3, memory_stats=lambda: stats or None)


def test_a_program_that_does_not_fit_is_one_line():
    def pairs(x):  # a table of all pairs, which XLA keeps, for it is used twice
        table = jnp.sort(x[:, None] - x[None], axis=0)
        return table @ table.T

    compiled = jax.jit(pairs).lower(jnp.ones(1024)).compile()
    needed = compiled.memory_analysis()
    assert needed.temp_size_in_bytes >= 4 * 2**20
    total = needed.temp_size_in_bytes + needed.output_size_in_bytes
    check_fits(compiled, device(bytes_limit=total + 10, bytes_in_use=10))
    with pytest.raises(mj.DeviceError, match=r"H100 3: the program needs 0\.01 GiB") as caught:
        check_fits(compiled, device(bytes_limit=total + 10, bytes_in_use=11))
    assert "\n" not in str(caught.value)


def test_a_device_that_does_not_tell_is_taken_to_have_enough():
    compiled = jax.jit(lambda x: x + 1).lower(1.0).compile()
    check_fits(compiled, device())
    check_fits(compiled, device(num_allocs=3))
