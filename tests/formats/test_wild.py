"""Files as other libraries lay them out: in several pieces, under other names, one level deeper."""

import json
import re
import warnings

import jax
import numpy as np
import orbax.checkpoint as ocp
import orbax.checkpoint.experimental.v1 as ocp1
import pytest
from safetensors.numpy import save_file

import megajax as mj

RNG = np.random.default_rng(0)
NET = {
    "params": {"fc": {"kernel": RNG.normal(size=(4, 3)).astype(np.float32), "bias": np.ones(3)}},
    "list": [np.arange(5)],
}
LIKE = jax.tree.map(np.zeros_like, NET)
FLAT = {"params/fc/kernel": NET["params"]["fc"]["kernel"], "params/fc/bias": np.ones(3)}
FLAT["list/0"] = NET["list"][0]


def same(loaded):
    assert jax.tree.structure(loaded) == jax.tree.structure(NET)
    for one, other in zip(jax.tree.leaves(loaded), jax.tree.leaves(NET), strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


def pieces(folder, tensors=FLAT, count=2, **changes):
    """Tensors in several files, as Hugging Face's libraries store large models."""
    folder.mkdir(exist_ok=True)
    weight_map = {}
    for k in range(count):
        names = sorted(tensors)[k::count]
        file = f"model-{k + 1:05}-of-{count:05}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map | changes}))
    return index


def test_safetensors_in_several_files_are_one_network(tmp_path):
    index = pieces(tmp_path / "net", count=3)
    same(mj.load_network(index, LIKE))
    same(mj.load_network(index.parent, LIKE))
    assert mj.load_network(index)["params"]["fc"]["bias"].tolist() == [1, 1, 1]
    with pytest.raises(
        mj.InterchangeError, match=r"json: leaf list/0 is int64\[6\] but int64\[5\]"
    ):
        mj.load_network(index, LIKE | {"list": [np.zeros(6, int)]})


def test_a_state_dict_in_several_files_is_matched_as_one_and_written_back(tmp_path):
    shapes = {"0.weight": (8, 4), "2.weight": (8, 8), "4.weight": (2, 8)}
    state = {name: RNG.normal(size=shape).astype("f4") for name, shape in shapes.items()}
    index = pieces(tmp_path / "net", state)
    network = mj.Network(lambda w, x: x @ w[0] @ w[1] @ w[2], [t.T for t in state.values()])
    names = mj.map_names(index, network, inputs=np.ones((1, 4)))
    loaded = mj.load_network(index, network, inputs=np.ones((1, 4), np.float32))
    np.testing.assert_array_equal(loaded[1], state["2.weight"].T)
    back = mj.load_network(mj.save_network(tmp_path / "back.npz", loaded, names=names))
    assert all((back[name] == state[name]).all() for name in state)


def test_an_index_that_its_files_contradict_is_damaged(tmp_path):
    first = "model-00001-of-00002.safetensors"
    for changes, message in (
        ({"more": first}, "more is not in model-00001"),
        ({"params/fc/bias": first, "list/0": first}, "params/fc/bias is not in"),
        ({"list/0": "model-00009-of-00002.safetensors"}, "model-00009-of-.* cannot be read"),
        ({"list/0": "../model.safetensors"}, "which is in another folder"),
    ):
        index = pieces(tmp_path / "net", **changes)
        with pytest.raises(mj.InterchangeError, match=message):
            mj.load_network(index, LIKE)
    for text in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "\ud800"):
        index.write_bytes(text.encode(errors="surrogatepass"))
        with pytest.raises(mj.InterchangeError, match=r"index\.json|3 cannot be read"):
            mj.load_network(index, LIKE)
    index = pieces(tmp_path / "net")
    part = index.parent / first
    part.with_name(f"{first}.sha256").write_text("0" * 64)
    with pytest.raises(mj.InterchangeError, match=rf"{first} is damaged"):
        mj.load_network(index, LIKE)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Checkpoints that Orbax wrote, in every layout of it."""
    folder = tmp_path_factory.mktemp("orbax")
    save, json_save = ocp.args.StandardSave(NET), ocp.args.JsonSave({"epoch": 3})
    with ocp.CheckpointManager(folder / "manager") as manager:
        manager.save(5, args=ocp.args.Composite(state=save, about=json_save))
        manager.save(12, args=ocp.args.Composite(ema=save, state=save))
        manager.wait_until_finished()
    with warnings.catch_warnings():  # of names that came after Orbax 0.12.0
        warnings.simplefilter("ignore", DeprecationWarning)
        ocp1.save_pytree(folder / "one", NET)
        ocp1.save_checkpointables(folder / "named", {"net": NET, "ema": NET})
        with ocp1.training.Checkpointer(folder / "training") as checkpointer:
            checkpointer.save_pytree(7, NET)
    options = {"use_ocdbt": False}
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)).save(folder / "apart", NET)
    options = {"use_ocdbt": True, "use_zarr3": True}
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)).save(folder / "zarr3", NET)
    return folder


@pytest.mark.parametrize(
    "path",
    [
        "manager/5",
        "manager/5/state",
        "manager/12/ema",
        "one",
        "one/state",
        "named/net",
        "training/7",
        "apart",
        "zarr3",
    ],
)
def test_every_layout_of_orbax_is_read(path, checkpoints):
    same(mj.load_network(checkpoints / path, LIKE))
    found = mj.load_network(checkpoints / path)
    np.testing.assert_array_equal(found["list"]["0"], np.arange(5))


def test_where_orbax_holds_several_they_are_listed(checkpoints):
    for path, message in (
        ("manager/12", "12 holds several networks: choose one of ema, state"),
        ("named", "named holds several networks: choose one of ema, net"),
        ("manager", "manager holds none of .*; choose one of its steps 5, 12"),
        ("training", "training holds none of .*; choose one of its steps 7"),
    ):
        with pytest.raises(mj.InterchangeError, match=message):
            mj.load_network(checkpoints / path, LIKE)


@pytest.mark.parametrize("kind", ["msgpack", "npz", "orbax", "safetensors"])
@pytest.mark.parametrize(
    ("stored", "like"),
    [
        ({"state": {"net": NET, "step": 3}}, NET),
        ({"net": NET, "opt_state": {"0": NET, "count": 1}, "step": 3}, NET),
        (NET, {"net": NET}),
        ({"step": 3, "opt": {"mu": NET}, **NET}, NET),
        ({"ema": {"a+b": NET}, **NET["params"]}, {"params": NET["params"]}),
    ],
)
def test_the_error_says_which_arguments_help_and_they_do(kind, stored, like, tmp_path):
    path = mj.save_network(tmp_path / "net", stored, format=kind)
    with pytest.raises(mj.InterchangeError, match="would help") as error:
        mj.load_network(path, like)
    advice = re.search(r"; ((?:rename|ignore)=.*) would help", str(error.value))[1]
    arguments = eval(f"dict({advice.replace(' and ignore=', ', ignore=')})")
    loaded = mj.load_network(path, like, **arguments)
    assert jax.tree.structure(loaded) == jax.tree.structure(like)
    np.testing.assert_array_equal(jax.tree.leaves(loaded)[1], jax.tree.leaves(like)[1])


def test_no_argument_is_advised_where_none_would_do(tmp_path):
    path = mj.save_network(tmp_path / "net.npz", {"body": np.ones(2), "tail": np.ones(3)})
    with pytest.raises(mj.InterchangeError) as error:
        mj.load_network(path, {"body": np.ones(2), "head": np.ones(3)})
    assert str(error.value) == (
        f"{path} lacks leaf head (float64[3]) and has tail (float64[3]), which the network does "
        "not have"
    )
