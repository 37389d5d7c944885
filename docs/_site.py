"""Pages of the site that are made: from the README, sections, modules, and tutorials that are run.

`mkdocs.yml` names this file as its hook.
"""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import _tutorials
from mkdocs.structure.files import File

import megajax
from megajax.run.config import Config
from megajax.sections import Section, fields

ROOT = Path(__file__).parent.parent
ROOMS = ["run", "report", "baselines", "formats", "zoo", "merging", "search", "evaluation"]
ROOMS += ["alignment", "program"]
GROUND = ["errors", "types", "trees", "sections", "io", "keys", "citations"]


def on_files(files, config):
    """Adds the pages that are made."""
    pages = {
        "index.md": _moved((ROOT / "README.md").read_text()),
        "contributing.md": _moved((ROOT / "CONTRIBUTING.md").read_text()),
        "configuration.md": configuration(),
        "reference/index.md": _public(),
        "reference/ground.md": _reference("errors and types", GROUND),
    }
    for room in ROOMS:
        pages[f"reference/{room}.md"] = _reference(room, _modules(room))
    for tutorial in sorted((ROOT / "docs" / "tutorials").glob("*.py")):
        pages |= {f"tutorials/{name}": one for name, one in _tutorials.made(tutorial).items()}
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def configuration():
    """Every field of every section, from the code."""
    lines = [
        "# Configuration",
        "",
        "Sections are arguments of `mj.merge` and parts of `mj.Config`. On the command line a",
        "field is `--config.SECTION.FIELD=VALUE`.",
    ]
    own = [entry for entry in fields(Config) if "." not in entry.name]
    sections = [Config, *(kind for kind in map(type, _values(Config())) if _is_section(kind))]
    for kind in sections:
        first = inspect.cleandoc(kind.__doc__).split("\n\n")[0]
        lines += ["", f"## {kind.section or 'The run itself'}: `{kind.__name__}`", "", first, ""]
        lines += ['<div class="fields" markdown>', ""]
        lines += ["| field | takes | default | meaning |", "| --- | --- | --- | --- |"]
        for entry in own if kind is Config else fields(kind):
            cells = (f"`{entry.name}`", entry.kind, f"`{entry.default!r}`", entry.meaning)
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        lines += ["", "</div>"]
    return "\n".join(lines) + "\n"


def _values(section):
    return [getattr(section, name) for name in type(section).model_fields]


def _is_section(kind):
    return issubclass(kind, Section)


def _moved(text):
    """A page of the root, whose links lead to what is on the site; other files are named."""
    text = re.sub(r"\]\(docs/([^)]+)\)", r"](\1)", text)
    text = text.replace("](CONTRIBUTING.md)", "](contributing.md)")
    return re.sub(r"\[([^]]+)\]\((?!https?:|#|[a-z_]+\.(?:md|png))([^)]+)\)", r"`\2`", text)


def _modules(room):
    package = importlib.import_module(f"megajax.{room}")
    found = pkgutil.walk_packages(package.__path__, f"{room}.")
    return [room, *(one.name for one in found if not one.name.rpartition(".")[2].startswith("_"))]


def _reference(title, names):
    """The modules of a room, with what each of them says is public."""
    blocks = [f"# {title}"]
    for name in names:
        module = importlib.import_module(f"megajax.{name}")
        listed = [one for one in getattr(module, "__all__", _defined(module)) if one[0] != "_"]
        own = [one for one in listed if _home(module, one) == module.__name__]
        if own:
            members = "".join(f"\n        - {one}" for one in own)
            blocks.append(f"::: megajax.{name}\n    options:\n      members:{members}")
    return "\n\n".join(blocks) + "\n"


def _defined(module):
    return [name for name, one in vars(module).items() if _of(one) == module.__name__]


def _of(value):
    return getattr(value, "__module__", None)


def _home(module, name):
    value = getattr(module, name)
    return _of(value) if inspect.isclass(value) or inspect.isroutine(value) else module.__name__


def _public():
    """Every name of `megajax`, with the first line of what it says and the place where it is."""
    names = sorted(one for one in dir(megajax) if one[0] != "_")
    rows = ["# Public names", "", "`import megajax as mj`", "", "| name | |", "| --- | --- |"]
    for name in names:
        value = getattr(megajax, name)
        if inspect.ismodule(value) or not str(_of(value)).startswith("megajax"):
            continue
        first = (inspect.getdoc(value) or "").partition("\n")[0]
        rows.append(f"| [`mj.{name}`][{value.__module__}.{value.__name__}] | {first} |")
    return "\n".join(rows) + "\n"
