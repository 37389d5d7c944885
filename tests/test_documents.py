"""What the documents say is so: snippets run as they stand, files and fields and messages exist."""

import html
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

import megajax
from megajax import baselines
from megajax.evaluation import robustness
from megajax.merging import genome, metrics
from megajax.run.config import Config, override
from megajax.search import methods, operators
from megajax.sections import fields
from megajax.zoo import networks

ROOT = Path(__file__).parent.parent
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page.name: page.read_text() for page in PAGES}
REGISTRIES = [
    baselines.BASELINES,
    genome.GENOMES,
    methods.METHODS,
    metrics.METRICS,
    networks.MODELS,
    operators.CROSSOVERS,
    operators.SELECTIONS,
    operators.SURVIVALS,
    robustness.CORRUPTIONS,
]


@pytest.fixture
def restored():
    """Registries as they were, whatever a snippet adds."""
    before = [dict(registry) for registry in REGISTRIES]
    yield
    for registry, old in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(old)


def snippets(text):
    """Python code in order of appearance: the hidden set-up first."""
    return re.findall(r"(?:<!-- setup|```python)\n(.*?)\n(?:-->|```)", text, re.DOTALL)


@pytest.mark.parametrize("page", [name for name, text in TEXTS.items() if snippets(text)])
def test_the_snippets_of_a_page_run(page, tmp_path, monkeypatch, restored, capsys):
    module = types.ModuleType("page")  # where dataclasses look their module up
    monkeypatch.setitem(sys.modules, "page", module)
    monkeypatch.chdir(tmp_path)
    for code in snippets(TEXTS[page]):
        exec(compile(code, page, "exec"), module.__dict__)
    if page in ("README.md", "quickstart.md"):  # what a new user sees first
        rows = re.findall(r"^(parent \d|merged):? ([\d.]+)", capsys.readouterr().out, re.MULTILINE)
        scores = {name: float(score) for name, score in rows}
        assert scores["merged"] > max(scores["parent 0"], scores["parent 1"])


@pytest.mark.parametrize("page", TEXTS)
def test_every_file_that_is_named_exists(page):
    named = re.findall(r"(?:experiments|benchmarks|docs|megajax|tests)/[\w/]+\.\w+", TEXTS[page])
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", TEXTS)
def test_every_field_in_a_command_exists(page):
    for block in re.findall(r"```sh\n(.*?)```", TEXTS[page], re.DOTALL):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            flags = [word.removeprefix("--config.") for word in words if "--config." in word]
            override(Config(), dict(flag.split("=", 1) for flag in flags))


def test_no_document_advises_an_installation_from_pypi():
    for text in TEXTS.values():
        assert not re.search(r"pip install \S*megajax", text)


def test_every_message_that_is_explained_is_one_of_the_librarys():
    sources = "".join(path.read_text() for path in sorted((ROOT / "megajax").rglob("*.py")))
    plain = re.sub(r"\"\n\s+f?\"|\{[^{}]*\}", "", sources)
    explained = re.findall(r"^`.*`$", TEXTS["troubleshooting.md"], re.MULTILINE)
    assert len(explained) > 15
    for line in explained:
        for message in re.findall(r"`([^`]+)`", line):
            assert message in plain, message


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The documentation, built as `make docs` does; minutes, most of them for the tutorials."""
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("MkDocs is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_has_every_name_and_field(site):
    pages = {page.name: html.unescape(page.read_text()) for page in site.glob("*.html")}
    names = (site / "reference" / "index.html").read_text()
    for name in dir(megajax):
        home = getattr(getattr(megajax, name), "__module__", "")
        if home.startswith("megajax") and name[0] != "_":
            assert f"mj.{name}<" in names, name
    for one in fields(Config):
        assert f"<code>{one.name}<" in pages["configuration.html"], one.name
        assert one.meaning, one.name
    for page in site.rglob("*.html"):
        for image in re.findall(r'<img [^>]*src="(?!data:)([^"]+)"', page.read_text()):
            assert (page.parent / image).exists(), image
    for tutorial in (ROOT / "docs" / "tutorials").glob("*.py"):
        page = (site / "tutorials" / f"{tutorial.stem}.html").read_text()
        assert f'href="{tutorial.stem}.ipynb"' in page


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["index", "configuration", "method", "tutorials/own_model"])
def test_no_page_of_the_site_is_wider_than_the_screen(site, tmp_path, name, width):
    """Code and other tables may scroll in boxes of their own; the tables of fields never do."""
    page = (site / f"{name}.html").as_uri()
    (tmp_path / "frame.html").write_text(
        f'<body><iframe src="{page}" style="border: 0; width: {width}px; height: 800px"></iframe>'
        "<script>onload = () => setTimeout(() => {"
        "const page = document.querySelector('iframe').contentDocument;"
        "const cut = [...page.querySelectorAll('.fields .md-typeset__scrollwrap')]"
        ".filter(e => e.scrollWidth > e.clientWidth + 1).length;"
        "document.body.textContent = `[${page.documentElement.scrollWidth}, ${cut}]`"
        "}, 1000)</script>"
    )
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += ["--disable-web-security", "--allow-file-access-from-files", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=6000"]
    command += ["--window-size=1400,900", (tmp_path / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    widest, cut = json.loads(re.search(r"<body>(.*)</body>", done.stdout)[1])
    assert widest <= width
    assert cut == 0
