"""Checkpoints: bit for bit, kept by rule, and never used when they are damaged or another's."""

import logging

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import megajax as mj
from megajax.run.checkpoint import CheckpointConfig, Checkpoints

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
        "key": jax.random.key(seed),
        "keys": jax.random.split(jax.random.key(seed, impl="rbg"), 2),
        "eighth": jnp.asarray(rng.normal(size=5), jnp.float8_e5m2),
        "complex": np.array([1j, seed]),
        "number": 3 + seed,
        "share": 1 / 3 + seed,
        "aux": (),
        "seconds": np.float64(1 / 3 + seed),
        "generation": jnp.int32(seed),
    }


def save(folder, *steps, config=ALWAYS, identity="a search"):
    checkpoints = Checkpoints(folder, identity, config)
    for step in steps:
        checkpoints.offer(step, state(step))


def restore(folder, like=None, identity="a search"):
    return Checkpoints(folder, identity, ALWAYS).restore(like)


def file_of(folder, step):
    (file,) = folder.glob(f"{step}.*")
    return file


def steps(folder):
    return sorted(int(path.name.split(".")[0]) for path in folder.iterdir())


def test_a_state_comes_back_bit_for_bit_in_its_containers(tmp_path):
    save(tmp_path / "c", 3)
    step, found = restore(tmp_path / "c", like=state(0))
    assert step == 3
    for name in ("key", "keys"):
        before, after = state(3)[name], found.pop(name)
        assert after.dtype == before.dtype
        assert (jax.random.key_data(after) == jax.random.key_data(before)).all()
    expected = {name: leaf for name, leaf in state(3).items() if name not in ("key", "keys")}
    chex.assert_trees_all_equal(found, expected)
    assert np.signbit(found["fitness"][2])
    numbers = [(found.pop(name), expected.pop(name)) for name in ("number", "share")]
    assert [type(there) for there, _ in numbers] == [int, float]
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    plain = restore(tmp_path / "c").state
    assert plain["params"]["1"]["half"].dtype == jnp.bfloat16
    chex.assert_trees_all_equal(plain["params"]["0"], expected["params"][0])


def test_the_newest_are_kept_and_the_newest_is_used(tmp_path):
    save(tmp_path / "c", 1, 2, 5)
    assert steps(tmp_path / "c") == [2, 5]
    save(tmp_path / "c", 6)
    assert steps(tmp_path / "c") == [5, 6]
    assert restore(tmp_path / "c").step == 6


def test_saved_as_often_as_asked_counting_from_what_was_restored(tmp_path):
    config = CheckpointConfig(every_generations=3, every_seconds=None, keep=9)
    checkpoints = Checkpoints(tmp_path / "c", "a search", config)
    for step in range(8):
        checkpoints.offer(step, state(step))
    checkpoints.save(7, state(7))
    checkpoints.save(7, state(7))  # there already
    assert steps(tmp_path / "c") == [3, 6, 7]
    checkpoints = Checkpoints(tmp_path / "c", "a search", config)
    assert checkpoints.restore().step == 7
    for step in range(8, 13):
        checkpoints.offer(step, state(step))
    assert steps(tmp_path / "c") == [3, 6, 7, 10]
    save(tmp_path / "never", 1, 2, config=CheckpointConfig(**NEVER))
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("harm", ["flip", "truncate", "empty"])
def test_a_damaged_checkpoint_is_told_and_removed_and_the_one_before_is_used(
    harm, tmp_path, caplog
):
    save(tmp_path / "c", 1, 2)
    file = file_of(tmp_path / "c", 2)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes({"flip": data, "truncate": data[:-1], "empty": b""}[harm])
    step, found = restore(tmp_path / "c", like=state(0))
    assert step == 1
    chex.assert_trees_all_equal(found["params"], state(1)["params"])
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warning == f"checkpoint {file} is not used: it is damaged"
    save(tmp_path / "c", 2)  # its place is free
    assert restore(tmp_path / "c").step == 2


def test_an_unfinished_checkpoint_is_no_checkpoint(tmp_path):
    save(tmp_path / "c", 1)
    file = file_of(tmp_path / "c", 1)
    file.rename(file.with_name(f".{file.name}.partial"))
    assert restore(tmp_path / "c") is None
    assert list((tmp_path / "c").iterdir()) == []  # it is cleared away
    assert restore(tmp_path / "nothing") is None
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    ("identity", "like", "why"),
    [
        ("another", None, "it is of another configuration"),
        ("a search", state(0) | {"more": np.zeros(2)}, "leaf more is absent in the checkpoint"),
        ("a search", {"fitness": jnp.zeros(4)}, " in the checkpoint, absent here"),
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
    with pytest.raises(
        mj.WorkdirError, match=r"file/c/1.*safetensors cannot be written: Not a dir"
    ):
        save(tmp_path / "file" / "c", 1)
