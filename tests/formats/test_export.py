"""Exports: what is written is the network, and the card says what it is."""

import hashlib
import re

import numpy as np
import pytest

import megajax as mj
from megajax.formats import FORMATS, model_card
from megajax.run.config import Config, to_dict

VARIABLES = {"params": {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3)}}


def table(card, heading):
    """Rows of the table under a heading, as dictionaries."""
    part = card.split(f"## {heading}\n\n")[1].split("\n\n")[0]
    lines = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in part.splitlines()
    ]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_all_formats_hold_the_network_and_the_card_has_their_sums(tmp_path):
    first = mj.save_network(tmp_path / "first.npz", VARIABLES)
    paths = mj.export(
        tmp_path / "out",
        VARIABLES,
        formats=tuple(FORMATS),
        parents=[first, {"path": "elsewhere", "accuracy": 0.5}],
        method=to_dict(Config()),
        figures={"parent 0": {"accuracy": 0.75}, "merged": {"accuracy": 0.8125, "nll": 1.5}},
        seed=7,
        versions={"megajax": "0.1.0", "jax": "0.10.2"},
    )
    for kind in FORMATS:
        loaded = mj.load_network(paths[kind], VARIABLES)
        np.testing.assert_array_equal(loaded["params"]["w"], VARIABLES["params"]["w"], strict=True)
    card = paths["card"].read_text()
    files = {row["format"]: row for row in table(card, "Files")}
    for kind in ("msgpack", "npz", "safetensors"):
        assert files[kind]["sha256"] == hashlib.sha256(paths[kind].read_bytes()).hexdigest()
    parents = table(card, "Parents")
    assert parents[0]["sha256"] == hashlib.sha256(first.read_bytes()).hexdigest()
    assert parents[1] == {"parent": "1", "path": "elsewhere", "sha256": "", "accuracy": "0.5"}
    method = {row["choice"]: row["value"] for row in table(card, "Method")}
    assert method["evolution.population_size"] == "32"
    assert table(card, "Figures")[1] == {"": "merged", "accuracy": "0.8125", "nll": "1.5"}
    assert "Seed 7. megajax 0.1.0, jax 0.10.2." in card
    mj.load_network(tmp_path / "out", VARIABLES)  # the folder is enough


def test_the_names_of_the_first_parent_are_kept(tmp_path):
    rng = np.random.default_rng(0)
    state = {
        "fc.weight": rng.normal(size=(3, 2)).astype(np.float32),
        "fc.bias": rng.normal(size=3).astype(np.float32),
        "fc.num_batches_tracked": np.array(4),
    }
    first = mj.save_network(tmp_path / "first.safetensors", state)
    like = {"w": np.zeros((2, 3), np.float32), "b": np.zeros(3, np.float32)}
    network = mj.Network(lambda w, x: x @ w["w"] + w["b"], like)
    names = mj.map_names(first, network, inputs=np.ones((1, 2)))
    merged = {"w": rng.normal(size=(2, 3)).astype(np.float32), "b": np.ones(3, np.float32)}
    paths = mj.export(tmp_path / "out", merged, formats=("safetensors", "msgpack"), names=names)
    written = mj.load_network(paths["safetensors"])
    assert set(written) == set(state)
    np.testing.assert_array_equal(written["fc.weight"], merged["w"].T, strict=True)
    assert written["fc.num_batches_tracked"] == 4
    np.testing.assert_array_equal(mj.load_network(paths["msgpack"])["w"], merged["w"])
    with pytest.raises(mj.InterchangeError, match=r"leaf extra has no name in .*first.safetensors"):
        mj.save_network(tmp_path / "x.npz", merged | {"extra": np.ones(1)}, names=names)
    with pytest.raises(mj.InterchangeError, match="can be written to safetensors and npz only"):
        mj.save_network(tmp_path / "x.msgpack", merged, names=names)


def test_a_card_says_only_what_it_was_told():
    card = model_card(parents=[{"path": "a|b"}])
    assert "## Parents" in card
    assert "a\\|b" in card
    assert not {"Files", "Method", "Figures", "Made with"} & set(re.findall(r"## (.*)", card))
    assert card.startswith("---\nlibrary_name: megajax\n")


def test_unknown_formats_and_missing_parents_are_named(tmp_path):
    with pytest.raises(mj.InterchangeError, match="format 'h5' is unknown: choose one of msgpack"):
        mj.export(tmp_path, VARIABLES, formats=("npz", "h5"))
    with pytest.raises(mj.InterchangeError, match="nowhere cannot be read"):
        mj.export(tmp_path, VARIABLES, parents=["nowhere"])
    assert not list(tmp_path.iterdir())
