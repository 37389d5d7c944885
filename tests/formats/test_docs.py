"""Everything that docs/parents.md shows runs as it stands, from top to bottom."""

import pathlib
import re
import shlex

import numpy as np

import megajax as mj
from megajax.run.config import Config, override

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "parents.md").read_text()


def snippets(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_page_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 5)).astype(np.float32)  # the page's
    for name, classes in (("a", 3), ("b", 3), ("c", 7)):
        sizes = {"lin.weight": (4, 5), "lin.bias": (4,), "fc.weight": (classes, 4)}
        sizes["fc.bias"] = (classes,)
        state = {tensor: rng.normal(size=size).astype(np.float32) for tensor, size in sizes.items()}
        mj.save_network(f"{name}.safetensors", state)
    state = mj.load_network("a.safetensors")
    hidden = np.maximum(x @ state["lin.weight"].T + state["lin.bias"], 0)
    np.save("a_logits.npy", hidden @ state["fc.weight"].T + state["fc.bias"])
    names = {}
    for code in snippets("python"):
        exec(code, names)
    np.testing.assert_allclose(names["outputs"], names["logits"], rtol=1e-4, atol=1e-5)
    assert names["get_config"]().parents.keep == (("head", 0),)
    shown = capsys.readouterr().out
    assert "a.safetensors: 4 arrays become leaves (2 as is; 2 transposed)" in shown
    back = mj.load_network("out/model.safetensors")
    assert {tensor: array.shape for tensor, array in back.items()} == {
        tensor: array.shape for tensor, array in state.items()
    }
    head = names["result"].variables["params"]["head"]["kernel"]
    np.testing.assert_array_equal(head, state["fc.weight"].T)


def test_the_pages_commands_have_fields_that_there_are():
    for command in snippets("sh"):
        flags = [word.partition("=") for word in shlex.split(command) if "--config." in word]
        changes = {flag.removeprefix("--config."): value for flag, _, value in flags}
        assert override(Config(), changes).parents.paths == ("a.safetensors", "b.safetensors")


def test_the_pages_advice_is_that_of_the_errors(tmp_path):
    net = {"params": {"w": np.ones(2)}}
    path = mj.save_network(tmp_path / "a.npz", {"state": net, "opt_state": net, "step": 3})
    assert r"""rename={"state/(.*)": r"\1"}""" in PAGE
    loaded = mj.load_network(path, net, rename={"state/(.*)": r"\1"}, ignore="^(opt_state|step)")
    assert loaded["params"]["w"].tolist() == [1, 1]
