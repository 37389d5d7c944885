"""What to cite: BibTeX of MeGA and of the methods that a configuration uses.

Knows the names of choices, and which papers they come from.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources

from megajax.baselines.given import NEEDS
from megajax.baselines.registry import applicable
from megajax.errors import ConfigError
from megajax.sections import Section

__all__ = ["citation"]

_ENTRIES = (resources.files("megajax") / "papers.bib").read_text("utf-8").strip().split("\n\n")
PAPERS = {entry.partition("{")[2].partition(",")[0]: entry for entry in _ENTRIES}
"""The entries of `papers.bib` by their names."""

EVOSAX = {"cma_es", "sep_cma_es", "differential_evolution"}
SOUPS = {"uniform_average", "greedy_soup"}


def citation(*sections: Section) -> str:
    """BibTeX of MeGA and of the methods that configuration sections use.

    Args:
        *sections: a whole `Config`, or the sections that `merge` and `run_baselines` were given.

    Raises:
        ConfigError: an argument is no section.

    Example:
        >>> from megajax.search.methods import EvolutionConfig
        >>> print(citation(EvolutionConfig(method="pbil")).split("@")[2])
        misc{pbil,
          author = {Baluja, Shumeet},
          title = {{Population-Based Incremental Learning: ...}},
          howpublished = {Carnegie Mellon University, technical report CMU-CS-94-163},
          year = {1994},
        }
    """
    for section in sections:
        if not isinstance(section, Section):
            raise ConfigError(f"citation takes sections, not a {type(section).__name__}")
    used = dict.fromkeys(["mega", *(name for one in sections for name in _used(one))])
    return "\n\n".join(PAPERS[name] for name in used)


def _used(section: Section) -> Iterator[str]:
    """Names in `PAPERS`."""
    values = {name: getattr(section, name) for name in type(section).model_fields}
    for inner in values.values():
        if isinstance(inner, Section):
            yield from _used(inner)
    match section.section:
        case "align":
            yield from ["git_re_basin"] if values["method"] != "none" else []
        case "recalibrate":
            yield from ["repair"] if values["enabled"] else []
        case "genome":
            yield from ["task_arithmetic"] if values["kind"] == "task_vectors" else []
            yield from ["ties"] if values["trim"] else []
        case "evolution":
            method = {"niches": "m2n2", "gradient": "adam"}.get(values["method"], values["method"])
            yield from [method] if method in PAPERS else []
            yield from ["adam"] if values["gradient_steps"] else []
            yield from ["evosax"] if method in EVOSAX else []
        case "baselines":
            listed = applicable(values["names"], NEEDS)
            names = ["soups" if name in SOUPS else name for name in listed]
            yield from (name for name in names if name in PAPERS)
            yield from ["evosax"] if EVOSAX & {*listed} else []
