"""Makes the README's results of the study's `results.json`: the tables are never written by hand.

    python experiments/study/tables.py            # rewrites the section of README.md, and tables.md
    python experiments/study/tables.py --check    # fails if they are not what results.json says

The README gets the rows that matter and what the search adds to what needs none; `tables.md` beside
this file has everybody.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megajax.evaluation.results import FEWEST, Comparison, comparison
from megajax.evaluation.statistics import paired_t
from megajax.report.text import headline, p_value, percent, points
from megajax.tables import to_markdown

HERE = Path(__file__).parent
README = HERE.parent.parent / "README.md"
START, END = "<!-- made by experiments/study/tables.py -->", "<!-- end -->"
NAMES = {"cifar10": "ResNet-8 on CIFAR-10", "digits": "CNNs on the digits"}
COSTS = {"cifar10": "115 networks", "digits": "1,920 networks"}
SETTINGS = {
    "same": "same data",
    "skewed": "class-skewed data",
    "shared": "class-skewed data, same initial weights",
}
ROWS = {
    "cifar10": {
        "best_parent": "best parent",
        "uniform_average": "average",
        "aligned_uniform_average": "average, aligned",
        "aligned_regmean": "RegMean, aligned",
        "aligned_pleas": "PLeaS, aligned",
        "evolved_paper": "MeGA as published (with 115 networks)",
        "evolved_channel_aligned": "evolved, channel masks, aligned",
        "merged": "gradient without labels, element masks, aligned",
        "best_parent_finetuned": "best parent, fine-tuned with labels for as long",
        "merged_finetuned": "gradient without labels, then fine-tuned for as long",
        "ensemble": "ensemble (twice the cost)",
    },
    "digits": {
        "best_parent": "best parent",
        "uniform_average": "average",
        "aligned_uniform_average": "average, aligned",
        "regmean": "RegMean",
        "aligned_regmean": "RegMean, aligned",
        "aligned_pleas": "PLeaS, aligned",
        "line": "best point of the line, aligned",
        "random_search": "random search, channel masks, aligned",
        "sep_cma_es": "CMA-ES (separable), channel masks, aligned",
        "evolved_paper": "MeGA as published (with 1,920 networks)",
        "evolved_paper_aligned": "MeGA's search, aligned",
        "evolved_global": "evolved, global masks",
        "evolved_layer": "evolved, layer masks",
        "evolved_channel": "evolved, channel masks",
        "evolved_element": "evolved, element masks",
        "evolved_global_aligned": "evolved, global masks, aligned",
        "evolved_layer_aligned": "evolved, layer masks, aligned",
        "merged": "evolved, channel masks, aligned",
        "evolved_element_aligned": "evolved, element masks, aligned",
        "evolved_m2n2": "M2N2 as published",
        "evolved_niches_channel_aligned": "niches, channel masks, aligned",
        "evolved_pbil_channel_aligned": "PBIL, binary channel masks, aligned",
        "evolved_one_plus_one_channel_aligned": "(1+1)-EA, binary channel masks, aligned",
        "evolved_memetic_channel_aligned": "memetic, channel masks, aligned",
        "evolved_gradient_channel_aligned": "gradient, channel masks, aligned",
        "evolved_gradient_element_aligned": "gradient, element masks, aligned",
        "evolved_distill_channel_aligned": "gradient without labels, channel masks, aligned",
        "evolved_distill_element_aligned": "gradient without labels, element masks, aligned",
        "evolved_distill_weights_aligned": "gradient without labels, the weights, aligned",
        "ensemble": "ensemble (twice the cost)",
    },
}
OF_WIDTHS = (
    "best_parent",
    "uniform_average",
    "aligned_uniform_average",
    "evolved_channel_aligned",
    "merged",
    "ensemble",
)
IN_FULL = {  # rows of `tables.md` alone
    "regmean",
    "line",
    "evolved_global",
    "evolved_layer",
    "evolved_element",
    "evolved_global_aligned",
}
AGAINST = {
    "cifar10": (
        "aligned_pleas",
        "evolved_paper",
        "evolved_channel_aligned",
        "best_parent_finetuned",
        "ensemble",
    ),
    "digits": (
        "aligned_uniform_average",
        "aligned_regmean",
        "aligned_pleas",
        "random_search",
        "sep_cma_es",
        "evolved_gradient_channel_aligned",
        "evolved_distill_channel_aligned",
        "evolved_distill_element_aligned",
        "ensemble",
    ),
}


def each(values: Sequence[float], form: str = ".1f") -> str:
    """The points of single seeds, in brackets."""
    return f" ({', '.join(format(100 * value, form) for value in values)})"


def accuracies(found: Mapping[str, Comparison], names: Mapping[str, str]) -> str:
    """Test accuracy and difference to the best parent, a column for each setting."""

    def cell(key: str, comparison: Comparison) -> str:
        row = comparison.row(key)
        if row is None:
            return ""
        if key not in comparison.by_seed:
            return f"{percent(row.test.estimate)} {points(row.difference)}".strip()
        ours = comparison.by_seed[key]
        text = percent(row.test.estimate) + each(ours)
        if row.difference is None:
            return text
        gains = np.subtract(ours, comparison.by_seed[comparison.best])
        return f"{text} {points(row.difference)}{each(gains, '+.1f')}"

    header = ["network", *(SETTINGS[setting] for setting in found)]
    body = [
        [name, *(cell(key, one) for one in found.values())]
        for key, name in names.items()
        if key not in IN_FULL and any(one.row(key) for one in found.values())
    ]
    return to_markdown([header, *body])


def gains(data: str, results: Mapping[str, Any]) -> str:
    """The merged network minus others, paired by seed."""

    def cell(networks: Mapping[str, Any], key: str) -> str:
        if key not in networks:
            return ""
        ours, theirs = (networks[name]["test_accuracy"]["values"] for name in ("merged", key))
        difference = paired_t(ours, theirs)
        if len(ours) < FEWEST:
            mean = f"{100 * difference.estimate:+.1f}"
            return mean + each(np.subtract(ours, theirs), "+.1f")
        return f"{points(difference)}, {p_value(difference.p_value)}"

    header = [f"{ROWS[data]['merged']}, against", *(SETTINGS[name] for name in results)]
    body = [
        [ROWS[data][key], *(cell(one["networks"], key) for one in results.values())]
        for key in AGAINST[data]
        if any(key in one["networks"] for one in results.values())
    ]
    return to_markdown([header, *body])


def widths(results: Mapping[str, Any]) -> str:
    """The pair of the first seed beside wider ones; "" if none was measured."""
    rows = []
    for setting, name in SETTINGS.items():
        pairs = {
            data.partition("_width")[2] or "16": found[setting]["networks"]
            for data, found in results.items()
            if data.startswith("cifar10") and setting in found
        }
        for width, networks in pairs.items() if len(pairs) > 1 else ():
            found = [networks.get(key, {}).get("test_accuracy") for key in OF_WIDTHS]
            rows.append([name, width, *(percent(one["values"][0]) if one else "" for one in found)])
    if not rows:
        return ""
    header = ["parents", "width", *(ROWS["cifar10"][key] for key in OF_WIDTHS)]
    return (
        "**Wider networks**: the pair of seed 0 at each width (channels of the first stage), at "
        "the same cost in\nnetworks. Test accuracy:\n\n" + to_markdown([header, *rows])
    )


def section(results: Mapping[str, Any]) -> str:
    """The README's section."""
    parts = []
    for data in (data for data in NAMES if data in results):
        settings = results[data]
        found = {name: comparison(one) for name, one in settings.items()}
        first = next(iter(settings.values()))
        counts = [len(one["seeds"]) for one in settings.values()]
        pairs = f"{counts[0]} pair{'s' * (counts[0] > 1)} for each column"
        if len(set(counts)) > 1:
            *most, last = map(str, counts)
            pairs = f"{', '.join(most)} and {last} pairs, column by column"
        few = [count < FEWEST for count in counts]
        sure, tests = "seed by seed", "points"
        if not all(few):
            sure = "with 95 % interval paired by seed"
            tests = "points; p-values of\nsingle t-tests, not corrected"
            if any(few):
                sure += f"; seed by seed\nwhere there are fewer than {FEWEST} pairs"
        parts += [
            f"**{NAMES[data]}**, {pairs}, "
            f"{first['data']['validation']:,} validation and {first['data']['test']:,} test "
            f"images; every search\ncosts {COSTS[data]}. Test accuracy and, in points, the "
            f"difference to the best parent, which validation\nchose ({sure}):",
            accuracies(found, ROWS[data]),
            f"What the search adds to what needs none, and to other searches ({tests}):",
            gains(data, settings),
        ]
        if data == "cifar10":
            parts += filter(None, [widths(results)])
    return "\n\n".join(parts)


def everybody(results: Mapping[str, Any]) -> str:
    """All rows of all settings, with the p-values that Holm's method adjusts over each table."""
    parts = ["# The study, everybody"]
    for data in (data for data in NAMES if data in results):
        for setting, one in results[data].items():
            found = comparison(one)
            rows = [
                [
                    ROWS[data].get(row.key, row.name),
                    percent(row.validation.estimate),
                    percent(row.test.estimate),
                    points(row.difference),
                    p_value(row.adjusted, ""),
                    percent(row.corrupted),
                    f"{row.evaluations:,} x {row.images_scored:,.0f}" if row.evaluations else "",
                ]
                for row in found.rows
            ]
            header = ["network", "validation", "test", "to best parent [points]", "p (Holm)"]
            header += ["corrupted", "networks x images scored"]
            parts += [f"## {NAMES[data]}, {SETTINGS[setting]}", " ".join(headline(found))]
            parts.append(to_markdown([header, *rows]))
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Writes both, or checks them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    results = json.loads((HERE / "results.json").read_text())
    readme = README.read_text()
    before, _, rest = readme.partition(START)
    _, _, after = rest.partition(END)
    pages = {
        README: f"{before}{START}\n\n{section(results)}\n\n{END}{after}",
        HERE / "tables.md": everybody(results),
    }
    for path, text in pages.items():
        if options.check and path.read_text() != text:
            sys.exit(f"{path.name} is not what results.json says: run {Path(__file__).name}")
        path.write_text(text)


if __name__ == "__main__":
    main()
