"""Tutorials are notebooks that are run while the site is built; `make docs` runs them all."""

import base64
import importlib.util
import json
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
TUTORIALS = sorted((DOCS / "tutorials").glob("*.py"))
SMALL = """# %% [markdown]
# # A title
#
# Words.

# %%
import matplotlib.pyplot as plt


class Here:
    pass


numbers = [1, 2]
print(numbers)

# %%
plt.plot(numbers)

# %% [markdown]
# The end.
"""


@pytest.fixture(scope="module")
def tutorials():
    spec = importlib.util.spec_from_file_location("_tutorials", DOCS / "_tutorials.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("file", TUTORIALS, ids=lambda file: file.stem)
def test_a_tutorial_is_on_the_site_and_begins_with_its_title(file, tutorials):
    assert f"tutorials/{file.stem}.md" in (DOCS.parent / "mkdocs.yml").read_text()
    cells = list(tutorials.cells_of(file.read_text()))
    assert cells[0].is_text
    assert cells[0].source.startswith("# ")
    for cell in cells:
        if not cell.is_text:
            compile(cell.source, file.name, "exec")


def test_a_page_and_a_notebook_show_what_was_printed_and_drawn(tutorials, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text(SMALL)
    made = tutorials.made(tmp_path / "small.py")
    assert set(made) == {"small.md", "small-0.png", "small.ipynb"}
    assert made["small-0.png"].startswith(b"\x89PNG")
    page = made["small.md"]
    assert page.startswith("# A title\n\nWords.")
    order = ["print(numbers)", "\n[1, 2]\n", "plt.plot(numbers)", "(small-0.png)", "The end."]
    places = [page.index(part) for part in order]
    assert places == sorted(places)
    kinds = [cell["cell_type"] for cell in json.loads(made["small.ipynb"])["cells"]]
    assert kinds == ["markdown", "code", "code", "markdown"]
    outputs = [cell.get("outputs") for cell in json.loads(made["small.ipynb"])["cells"]]
    assert outputs[1][0]["text"] == "[1, 2]\n"
    assert base64.b64decode(outputs[2][0]["data"]["image/png"]) == made["small-0.png"]


def test_a_cell_that_fails_ends_the_build_and_is_named(tutorials):
    with pytest.raises(RuntimeError, match=r"bad.py: this cell failed:\n\n1 / 0"):
        tutorials.run("bad.py", "# %%\nfine = 1\n\n# %%\n1 / 0\n")
