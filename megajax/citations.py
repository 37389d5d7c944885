"""What to cite: BibTeX of MeGA and of the methods that a configuration uses.

Knows the names of choices, and which papers they come from.
"""

from __future__ import annotations

from collections.abc import Iterator

from megajax.baselines import BASELINES
from megajax.errors import ConfigError
from megajax.sections import Section

__all__ = ["citation"]

PAPERS: dict[str, tuple[str, str, str, int]] = {
    "mega": (
        "Yun, Daniel",
        "Merging Multiple Independently Trained Neural Networks Based on Genetic Algorithm",
        "arXiv:2406.04607",
        2024,
    ),
    "git_re_basin": (
        "Ainsworth, Samuel K. and Hayase, Jonathan and Srinivasa, Siddhartha",
        "Git Re-Basin: Merging Models modulo Permutation Symmetries",
        "arXiv:2209.04836",
        2023,
    ),
    "repair": (
        "Jordan, Keller and Sedghi, Hanie and Saukh, Olga and Entezari, Rahim and "
        "Neyshabur, Behnam",
        "REPAIR: REnormalizing Permuted Activations for Interpolation Repair",
        "arXiv:2211.08403",
        2023,
    ),
    "soups": (
        "Wortsman, Mitchell and others",
        "Model soups: averaging weights of multiple fine-tuned models improves accuracy without "
        "increasing inference time",
        "arXiv:2203.05482",
        2022,
    ),
    "slerp": (
        "Shoemake, Ken",
        "Animating Rotation with Quaternion Curves",
        "SIGGRAPH",
        1985,
    ),
    "fisher": (
        "Matena, Michael and Raffel, Colin",
        "Merging Models with Fisher-Weighted Averaging",
        "arXiv:2111.09832",
        2022,
    ),
    "regmean": (
        "Jin, Xisen and Ren, Xiang and Preotiuc-Pietro, Daniel and Cheng, Pengxiang",
        "Dataless Knowledge Fusion by Merging Weights of Language Models",
        "arXiv:2212.09849",
        2023,
    ),
    "regmean_plus": (
        "Nguyen and others",
        "RegMean++: Enhancing Effectiveness and Generalization of Regression Mean for Model "
        "Merging",
        "arXiv:2508.03121",
        2026,
    ),
    "pleas": (
        "Nasery and others",
        "PLeaS: Merging Models with Permutations and Least Squares",
        "arXiv:2407.02447",
        2025,
    ),
    "task_arithmetic": (
        "Ilharco, Gabriel and others",
        "Editing Models with Task Arithmetic",
        "arXiv:2212.04089",
        2023,
    ),
    "ties": (
        "Yadav, Prateek and Tam, Derek and Choshen, Leshem and Raffel, Colin and Bansal, Mohit",
        "TIES-Merging: Resolving Interference When Merging Models",
        "arXiv:2306.01708",
        2023,
    ),
    "dare": (
        "Yu, Le and Yu, Bowen and Yu, Haiyang and Huang, Fei and Li, Yongbin",
        "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free "
        "Lunch",
        "arXiv:2311.03099",
        2024,
    ),
    "m2n2": (
        "Abrantes, Jo{\\~a}o and Lange, Robert Tjarko and Tang, Yujin",
        "Competition and Attraction Improve Model Fusion",
        "arXiv:2508.16204",
        2025,
    ),
    "nsga2": (
        "Deb, Kalyanmoy and Pratap, Amrit and Agarwal, Sameer and Meyarivan, T.",
        "A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II",
        "IEEE Transactions on Evolutionary Computation 6(2)",
        2002,
    ),
    "pbil": (
        "Baluja, Shumeet",
        "Population-Based Incremental Learning: A Method for Integrating Genetic Search Based "
        "Function Optimization and Competitive Learning",
        "Technical report CMU-CS-94-163",
        1994,
    ),
    "one_plus_one": (
        "Droste, Stefan and Jansen, Thomas and Wegener, Ingo",
        "On the Analysis of the (1+1) Evolutionary Algorithm",
        "Theoretical Computer Science 276",
        2002,
    ),
    "evosax": (
        "Lange, Robert Tjarko",
        "evosax: JAX-based Evolution Strategies",
        "arXiv:2212.04180",
        2022,
    ),
    "cma_es": (
        "Hansen, Nikolaus",
        "The CMA Evolution Strategy: A Tutorial",
        "arXiv:1604.00772",
        2016,
    ),
    "sep_cma_es": (
        "Ros, Raymond and Hansen, Nikolaus",
        "A Simple Modification in CMA-ES Achieving Linear Time and Space Complexity",
        "PPSN",
        2008,
    ),
    "differential_evolution": (
        "Storn, Rainer and Price, Kenneth",
        "Differential Evolution: A Simple and Efficient Heuristic for Global Optimization over "
        "Continuous Spaces",
        "Journal of Global Optimization 11",
        1997,
    ),
    "adam": (
        "Kingma, Diederik P. and Ba, Jimmy",
        "Adam: A Method for Stochastic Optimization",
        "arXiv:1412.6980",
        2015,
    ),
}
"""Authors, title, where and when."""

BASELINE_PAPERS = {
    "uniform_average": "soups",
    "greedy_soup": "soups",
    **{name: name for name in ("slerp", "fisher", "regmean", "regmean_plus", "pleas")},
    **{name: name for name in ("task_arithmetic", "ties", "dare")},
    **{name: name for name in ("cma_es", "sep_cma_es", "differential_evolution")},
}
"""The papers of the baselines; what is not here has none."""

EVOSAX = ("cma_es", "sep_cma_es", "differential_evolution")


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
          howpublished = {Technical report CMU-CS-94-163},
          year = {1994},
        }
    """
    for section in sections:
        if not isinstance(section, Section):
            raise ConfigError(f"citation takes sections, not a {type(section).__name__}")
    used = dict.fromkeys(["mega", *(name for one in sections for name in _used(one))])
    return "\n\n".join(map(_entry, used))


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
            names = values["names"]
            chosen = {
                "all": list(BASELINES),
                "default": [name for name, one in BASELINES.items() if one.default],
            }
            listed = chosen.get(names, [names]) if isinstance(names, str) else names
            yield from (BASELINE_PAPERS[name] for name in listed if name in BASELINE_PAPERS)
            yield from ["evosax"] if {*listed} & {*EVOSAX} else []


def _entry(name: str) -> str:
    author, title, where, year = PAPERS[name]
    fields = {"author": author, "title": f"{{{title}}}", "howpublished": where, "year": year}
    lines = [f"  {field} = {{{value}}}," for field, value in fields.items()]
    return "\n".join([f"@misc{{{name},", *lines, "}"])
