"""Checkpoints: bit for bit, kept by rule, and never used when they are damaged or another's."""

import logging

import chex
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import megajax as mj
from megajax.run.checkpoint import CheckpointConfig, Checkpoints, fit

ALWAYS = CheckpointConfig(every_seconds=0, keep=2)
NEVER = {"every_seconds": None}


def state(seed):
    """Leaves of every kind that a search or a training carries."""
    rng = np.random.default_rng(seed)
    params = {"kernel": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)}
    return {
        "optimizer": optax.adam(1e-3).init(params),
        "params": [params, {"half": jnp.asarray(rng.normal(size=5), jnp.bfloat16)}],
        "fitness": jnp.array([jnp.nan, -jnp.inf, -0.0, 1.5]),
        "right": jnp.array([True, False]),
        "empty": jnp.zeros((0, 7), jnp.int32),
        "aux": (),
        "seconds": np.float64(1 / 3 + seed),
        "generation": jnp.int32(seed),
    }


def save(folder, *steps, config=ALWAYS, identity="a search"):
    with Checkpoints(folder, identity, config) as checkpoints:
        for step in steps:
            checkpoints.offer(step, state(step))


def restore(folder, like=None, identity="a search"):
    with Checkpoints(folder, identity, ALWAYS) as checkpoints:
        return checkpoints.restore(like)


def steps(folder):
    return sorted(int(path.name) for path in folder.iterdir())


def test_a_state_comes_back_bit_for_bit_in_its_containers(tmp_path):
    save(tmp_path / "c", 3)
    step, found = restore(tmp_path / "c", like=state(0))
    assert step == 3
    chex.assert_trees_all_equal(found, state(3))
    chex.assert_trees_all_equal_shapes_and_dtypes(found, state(3))
    assert np.signbit(found["fitness"][2])
    plain = restore(tmp_path / "c").state
    assert plain["params"]["1"]["half"].dtype == jnp.bfloat16
    chex.assert_trees_all_equal(fit(state(0), plain), found)


def test_the_newest_are_kept_and_the_newest_is_used(tmp_path):
    save(tmp_path / "c", 1, 2, 5)
    assert steps(tmp_path / "c") == [2, 5]
    save(tmp_path / "c", 6)
    assert steps(tmp_path / "c") == [5, 6]
    assert restore(tmp_path / "c").step == 6


def test_saved_as_often_as_asked_counting_from_what_was_restored(tmp_path):
    config = CheckpointConfig(every_generations=3, every_seconds=None, keep=9)
    with Checkpoints(tmp_path / "c", "a search", config) as checkpoints:
        for step in range(8):
            checkpoints.offer(step, state(step))
        checkpoints.save(7, state(7))
        checkpoints.save(7, state(7))  # there already
    assert steps(tmp_path / "c") == [3, 6, 7]
    with Checkpoints(tmp_path / "c", "a search", config) as checkpoints:
        assert checkpoints.restore().step == 7
        for step in range(8, 13):
            checkpoints.offer(step, state(step))
    assert steps(tmp_path / "c") == [3, 6, 7, 10]
    save(tmp_path / "never", 1, 2, config=CheckpointConfig(**NEVER))
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "add"])
def test_a_damaged_checkpoint_is_told_and_removed_and_the_one_before_is_used(
    harm, tmp_path, caplog
):
    save(tmp_path / "c", 1, 2)
    newest = tmp_path / "c" / "2" / "state"
    file = max(newest.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    if harm == "flip":
        file.write_bytes(data)
    elif harm == "truncate":
        file.write_bytes(data[:-1])
    elif harm == "remove":
        file.unlink()
    else:
        (newest / "more").write_bytes(b"")
    step, found = restore(tmp_path / "c", like=state(0))
    assert step == 1
    chex.assert_trees_all_equal(found, state(1))
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    name = "state/more" if harm == "add" else file.relative_to(newest.parent)
    assert warning == f"checkpoint {tmp_path / 'c' / '2'} is not used: {name} is damaged"
    save(tmp_path / "c", 2)  # its place is free
    assert restore(tmp_path / "c").step == 2


def test_an_unfinished_checkpoint_is_no_checkpoint(tmp_path):
    save(tmp_path / "c", 1)
    (tmp_path / "c" / "1").rename(tmp_path / "c" / "2.orbax-checkpoint-tmp")
    assert restore(tmp_path / "c") is None
    assert steps(tmp_path / "c") == []  # it is cleared away
    assert restore(tmp_path / "nothing") is None
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    ("identity", "like", "why"),
    [
        ("another", None, "it is of another configuration"),
        ("a search", state(0) | {"more": np.zeros(2)}, "leaf more is absent in the checkpoint"),
        ("a search", {"fitness": jnp.zeros(4)}, "leaf generation is int32[] in the checkpoint, ab"),
        ("a search", state(0) | {"right": jnp.zeros(3, bool)}, "leaf right is bool[2] in the ch"),
        ("a search", state(0) | {"right": jnp.zeros(2)}, "bool[2] in the checkpoint, float32[2]"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_not_used(identity, like, why, tmp_path, caplog):
    save(tmp_path / "c", 1)
    assert restore(tmp_path / "c", like, identity) is None
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert why in warning


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(mj.WorkdirError, match=r"file/c cannot be written: .*Not a directory"):
        save(tmp_path / "file" / "c", 1)
