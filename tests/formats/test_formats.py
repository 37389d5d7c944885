"""Every format gives back every bit; what is damaged, absurd or a pickle is one line."""

import json
import pathlib
import pickle
import struct
import tracemalloc
import typing
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from flax import nnx, serialization

import megajax as mj
from megajax.formats import FORMATS, fingerprint, kinds
from megajax.formats.arrays import Format, Spec, Stored
from megajax.formats.disk import one_line, write_whole
from megajax.trees import leaf_paths

PLACES = {"msgpack": "net.msgpack", "npz": "net.npz", "safetensors": "net.safetensors"}


class Pair(typing.NamedTuple):
    left: typing.Any
    right: typing.Any


def every_kind():
    """Leaves of all dtypes and shapes, random bits (NaNs and -0.0 included), in all containers."""
    rng = np.random.default_rng(0)

    def bits(dtype, *shape):
        dtype = np.dtype(dtype)
        size = int(np.prod(shape))
        return np.frombuffer(rng.bytes(size * dtype.itemsize), dtype).reshape(shape)

    return {
        "params": {
            "bfloat16": bits(ml_dtypes.bfloat16, 3, 5),
            "float8": bits(ml_dtypes.float8_e4m3fn, 7),
            "half": bits("float16", 2, 3, 4),
            "scalar": bits("float32"),
            "one": bits("float64", 1),
            "fortran": np.asfortranarray(bits("float32", 4, 3)),
        },
        "list": [bits("int8", 4), (bits("uint16", 2, 2), bits("int64", 3)), {}],
        "pair": Pair(bits("uint32", 2), [bits("complex64", 2)]),
        "flags": np.array([True, False]),
        "empty": {"none": np.zeros((0, 3), np.float32), "nothing": np.zeros(0, np.int32)},
        "a/b": jnp.arange(3.0),
        "big_endian": np.arange(3, dtype=">i4"),
        "keys": {7: np.int16(-3), 11: np.int32(4)},
        "number": 0.1,
    }


def save(folder, kind, variables):
    place = folder / PLACES.get(kind, "net")
    return mj.save_network(place, variables, format=kind)


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    leaves = zip(leaf_paths(expected), *map(jax.tree.leaves, (found, expected)), strict=True)
    for path, one, other in leaves:
        other = np.asarray(other)
        assert isinstance(one, np.ndarray), path
        assert (one.shape, one.dtype) == (other.shape, other.dtype.newbyteorder("=")), path
        assert one.tobytes() == other.astype(one.dtype).tobytes(), path


@pytest.mark.parametrize("kind", FORMATS)
def test_the_round_trip_is_bit_for_bit(kind, tmp_path):
    variables = every_kind()
    like = jax.tree.map(lambda leaf: np.zeros_like(np.asarray(leaf)), variables)
    assert_same_bits(mj.load_network(save(tmp_path, kind, variables), like), variables)
    again = save(tmp_path, kind, like)  # in the place of the first
    assert_same_bits(mj.load_network(again, variables), like)
    left = {path.name.removesuffix(".sha256") for path in tmp_path.iterdir()}
    assert left == {again.name}


@pytest.mark.parametrize("kind", FORMATS)
def test_nnx_states_and_single_arrays_come_back(kind, tmp_path):
    model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    model(jax.random.normal(jax.random.key(0), (8, 3)))
    state = nnx.state(model)
    loaded = mj.load_network(save(tmp_path, kind, state), state)
    for one, other in zip(jax.tree.leaves(loaded), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(one, other, strict=True)
    # The same file for the model, whose variables are a pure dictionary.
    pure = mj.load_network(tmp_path / PLACES.get(kind, "net"), nnx.BatchNorm(3, rngs=nnx.Rngs(1)))
    np.testing.assert_array_equal(pure["mean"], model.mean[...])
    assert float(pure["var"].min()) != 1.0
    alone = np.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(mj.load_network(save(tmp_path, kind, alone), alone), alone)


def test_flax_safetensors_and_numpy_read_what_is_written_and_the_other_way_round(tmp_path):
    variables = {
        "params": {"w": np.arange(6.0, dtype=np.float32).reshape(2, 3)},
        "t": (np.ones(2),),
    }
    data = save(tmp_path, "msgpack", variables).read_bytes()
    assert_same_bits(serialization.from_bytes(variables, data), variables)
    (tmp_path / "other.msgpack").write_bytes(serialization.to_bytes(variables))
    assert_same_bits(mj.load_network(tmp_path / "other.msgpack", variables), variables)

    named = safetensors.numpy.load_file(save(tmp_path, "safetensors", variables))
    np.testing.assert_array_equal(named["params/w"], variables["params"]["w"])
    safetensors.numpy.save_file({"params.w": named["params/w"]}, tmp_path / "dots.safetensors")
    like = {"params": {"w": named["params/w"]}}
    assert_same_bits(mj.load_network(tmp_path / "dots.safetensors", like), like)

    with np.load(save(tmp_path, "npz", variables), allow_pickle=False) as archive:
        np.testing.assert_array_equal(archive["t/0"], np.ones(2))
    np.savez_compressed(tmp_path / "z.npz", **{"w": np.arange(3, dtype=ml_dtypes.bfloat16)})
    like = {"w": np.zeros(3, ml_dtypes.bfloat16)}
    assert mj.load_network(tmp_path / "z.npz", like)["w"].tolist() == [0, 1, 2]

    mj.save_network(tmp_path / "merged", variables)
    assert_same_bits(mj.load_network(tmp_path / "merged", variables), variables)
    assert mj.load_network(tmp_path / "merged")["t"]["0"].tolist() == [1, 1]


def test_checkpoints_that_orbax_wrote_by_itself(tmp_path):
    variables = {"params": {"w": jnp.arange(6.0).reshape(2, 3)}, "list": [jnp.ones(2)]}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "standard", variables)
    expected = jax.device_get(variables)
    assert_same_bits(mj.load_network(tmp_path / "standard", variables), expected)
    with ocp.CheckpointManager(tmp_path / "manager") as manager:
        manager.save(3, args=ocp.args.StandardSave({"step": 3, "net": variables}))
        manager.wait_until_finished()
    loaded = mj.load_network(
        tmp_path / "manager" / "3",
        variables,
        rename={"net/(.*)": r"\1"},
        ignore="^step$",
    )
    assert_same_bits(loaded, expected)
    with pytest.raises(mj.InterchangeError, match=r"manager holds none of .* its steps 3"):
        mj.load_network(tmp_path / "manager", variables)


SMALL = {"params": {"w": np.linspace(0, 1, 24, dtype=np.float32).reshape(4, 6), "b": np.ones(6)}}


def files_of(path):
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("sums", [True, False])
def test_truncated_and_flipped_files_are_one_line_and_never_a_wrong_network(kind, sums, tmp_path):
    path = save(tmp_path, kind, SMALL)
    listed = path / "SHA256SUMS" if path.is_dir() else path.with_name(path.name + ".sha256")
    if not sums:
        listed.unlink()
    rng = np.random.default_rng(0)
    silent = 0
    for file in files_of(path):
        if file == listed:
            continue
        whole = file.read_bytes()
        count = max(2, 40 // len(files_of(path)))
        damaged = [whole[: int(n)] for n in rng.integers(len(whole), size=count)]
        for place in rng.integers(len(whole), size=count):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << int(rng.integers(8))
            damaged.append(bytes(flipped))
        for data in damaged:
            file.write_bytes(data)
            message = ""
            try:
                loaded = mj.load_network(path, SMALL)
            except mj.InterchangeError as error:
                message = str(error)
            if message:
                assert path.name in message
                assert "\n" not in message
            else:  # a number has changed, which no one can see without a sum
                silent += 1
                assert jax.tree.map(np.shape, loaded) == jax.tree.map(np.shape, SMALL)
        file.write_bytes(whole)
    assert_same_bits(mj.load_network(path, SMALL), SMALL)
    assert not (sums and silent)


def test_damaged_sums_are_damage(tmp_path):
    path = save(tmp_path, "npz", SMALL)
    listed = path.with_name(path.name + ".sha256")
    assert listed.read_text().split() == [fingerprint(path), "net.npz"]
    listed.write_text("0" + listed.read_text()[1:])
    with pytest.raises(
        mj.InterchangeError, match=r"net.npz is damaged: .* that net.npz.sha256 says"
    ):
        mj.load_network(path, SMALL)


def header(entries, length=None):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


def npy(shape, descr="<f4"):
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (63 - (10 + len(text)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def archive(path, name, data, size=None):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(name, data)
        if size is not None:
            file.filelist[0].file_size = size


def test_absurd_sizes_are_refused_before_anything_is_allocated(tmp_path):
    huge = 10**15
    entry = {"dtype": "F32", "shape": [huge // 4], "data_offsets": [0, huge]}
    files = {
        "claims.safetensors": header({"w": entry}),
        "header.safetensors": header({}, length=2**60),
        "overflow.safetensors": header({"w": entry | {"shape": [2**33, 2**33]}}),
        "nested.msgpack": b"\x91" * 100_000,
        "array.msgpack": b"\xdd\xff\xff\xff\xff",
        "extension.msgpack": b"\xc9\xff\xff\xff\xff\x01",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    archive(tmp_path / "claims.npz", "w.npy", npy((huge,)))
    archive(tmp_path / "zip.npz", "w.npy", npy((huge,)), size=4 * huge + 128)
    archive(tmp_path / "negative.npz", "w.npy", npy((-1,)))
    archive(tmp_path / "overflow.npz", "w.npy", npy((2**62, 2**62)))
    tracemalloc.start()
    for path in sorted(tmp_path.iterdir()):
        for like in (None, {"w": np.ones(2)}):
            with pytest.raises(mj.InterchangeError, match=path.name):
                mj.load_network(path, like)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_a_bomb_is_refused_by_the_network_or_by_its_size_on_disk(tmp_path):
    zeros = np.zeros(8_000_000, np.float32)
    bomb = save(tmp_path, "orbax", {"w": zeros})
    with pytest.raises(mj.InterchangeError, match="and says it holds 32000000: give like="):
        mj.load_network(bomb)
    with pytest.raises(mj.InterchangeError, match=r"leaf w is float32\[3\] but float32\[8000000\]"):
        mj.load_network(bomb, {"w": np.ones(3, np.float32)})
    large = tmp_path / "large.msgpack"
    with large.open("wb") as file:
        file.truncate(80_000_000)  # sparse
    with pytest.raises(mj.InterchangeError, match="has 80000000 bytes: the network needs about 12"):
        mj.load_network(large, {"w": np.ones(3, np.float32)})


class Malice:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def test_pickles_are_never_loaded(tmp_path):
    data = pickle.dumps(Malice())
    for name in ("net.pt", "net.pth", "net.pkl", "net.bin", "net.ckpt"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(mj.InterchangeError, match=rf"{name} is a pickle.*save_file"):
            mj.load_network(tmp_path / name)
    for name in ("net.npz", "net.msgpack", "net.safetensors"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(mj.InterchangeError, match=name):
            mj.load_network(tmp_path / name)
    archive(tmp_path / "object.npz", "w.npy", npy((1,), "|O") + data)
    archive(tmp_path / "torch.npz", "archive/data.pkl", data)
    archive(tmp_path / "bits.npz", "w::finfo.npy", npy((1,), "<u8") + bytes(8))
    for name, what in (
        ("object", "w holds pickled"),
        ("torch", "data.pkl is no"),
        ("bits", "finfo"),
    ):
        with pytest.raises(mj.InterchangeError, match=what):
            mj.load_network(tmp_path / f"{name}.npz")


def test_everything_that_does_not_fit_is_named(tmp_path):
    path = save(tmp_path, "npz", {"a": np.ones(2), "b": np.ones((2, 3)), "c": np.ones(4, np.int32)})
    like = {"a": np.ones(3), "b": np.ones((3, 2)), "c": np.ones(4, np.float32)}
    with pytest.raises(mj.InterchangeError) as error:
        mj.load_network(path, like)
    assert str(error.value) == (
        f"{path}: leaf a is float64[3] but float64[2] in the file; leaf b is float64[3,2] but "
        "float64[2,3] in the file; leaf c is float32[4] but int32[4] in the file"
    )
    with pytest.raises(mj.InterchangeError) as error:
        mj.load_network(path, {"a": np.ones(2), "d": np.ones(1)})
    assert str(error.value) == (
        f"{path} lacks leaf d (float64[1]) and has b (float64[2,3]), c (int32[4]), which the "
        "network does not have"
    )
    loaded = mj.load_network(path, {"a": np.ones(2, np.float16)}, ignore="b|c", cast=True)
    assert loaded["a"].dtype == np.float16
    like = {"a": np.ones(2, complex)}
    path = save(tmp_path, "npz", {"a": np.ones(2, np.complex64)})
    with pytest.raises(mj.InterchangeError, match=r"complex128.* but complex64.*cast=True conv"):
        mj.load_network(path, like)
    assert mj.load_network(path, like, cast=True)["a"].dtype == complex


def test_what_cannot_be_written_is_named(tmp_path):
    with pytest.raises(
        mj.InterchangeError, match="leaf w is complex128, which safetensors cannot hold"
    ):
        save(tmp_path, "safetensors", {"w": np.ones(2, complex)})
    with pytest.raises(mj.InterchangeError, match="leaf w is a key<fry>"):
        save(tmp_path, "npz", {"w": jax.random.key(0)})
    with pytest.raises(mj.InterchangeError, match="two leaves are called a/b"):
        save(tmp_path, "npz", {"a": {"b": 1}, "a/b": 2})
    with pytest.raises(mj.InterchangeError, match="format 'h5' is unknown: choose one of msgpack"):
        mj.save_network(tmp_path, {"w": np.ones(2)}, format="h5")
    (tmp_path / "file").write_text("")
    with pytest.raises(mj.InterchangeError, match=r"net.npz cannot be written: File exists"):
        mj.save_network(tmp_path / "file" / "net.npz", {"w": np.ones(2)})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_is_not_there_or_unknown_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "folder.npz").mkdir()
    for path, message in (
        (tmp_path / "nowhere.npz", "nowhere.npz does not exist"),
        (tmp_path / "a.txt", "a.txt has no known format: .msgpack, .npz, .safetensors"),
        (tmp_path, "holds none of variables.msgpack, variables.npz"),
        (tmp_path / "folder.npz", "folder.npz holds none of"),
    ):
        with pytest.raises(mj.InterchangeError, match=message):
            mj.load_network(path)


def open_json(path):
    with one_line(path):
        values = {name: np.asarray(value) for name, value in json.loads(path.read_text()).items()}
    specs = {name: Spec(array.shape, array.dtype) for name, array in values.items()}
    return Stored(path, specs, lambda names: {name: values[name] for name in names})


def write_json(path, arrays):
    values = {"/".join(keys): array.tolist() for keys, array in arrays.items()}
    write_whole(path, json.dumps(values).encode())


def test_a_format_is_two_functions_and_a_record(tmp_path, monkeypatch):
    assert set(FORMATS) == {path.stem for path in pathlib.Path(kinds.__path__[0]).glob("[!_]*.py")}
    entry = Format("json", ("variables.json",), open_json, write_json, "any JSON", flat=True)
    monkeypatch.setitem(FORMATS, "json", entry)
    net = {"layers": [{"w": np.eye(2), "steps": np.array(3)}]}
    for place in (tmp_path / "a.json", tmp_path / "folder"):
        file = mj.save_network(place, net, format="json")
        assert_same_bits(mj.load_network(place, net), net)
    assert file.name == "variables.json"
    card = mj.export(tmp_path / "out", net, formats=("json", "npz"))["card"].read_text()
    assert "any JSON" in card
    file.write_text("[1]")
    with pytest.raises(mj.InterchangeError, match=r"variables.json is damaged: it does not have"):
        mj.load_network(file)
    file.with_name("variables.json.sha256").unlink()
    with pytest.raises(mj.InterchangeError, match=r"variables.json is damaged: AttributeError"):
        mj.load_network(file)
