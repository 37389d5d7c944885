"""The report: what it says, what it draws, and that a browser can show it with no network."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from planted_runs import CORRUPTIONS, SHARES, history, planted_run

from megajax import report
from megajax.evaluation.results import aggregate, comparison
from megajax.evaluation.statistics import Interval
from megajax.report import plots, text
from megajax.report.page import Heading, Paragraph, Picture, Table, to_html, to_markdown

PICTURES = {"accuracy", "per_class", "robustness", "fitness", "mask", "path"}


@pytest.fixture(scope="module")
def run():
    return planted_run(0)


@pytest.fixture(scope="module")
def found(run):
    return comparison(*run)


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    results, predictions = run
    folder = tmp_path_factory.mktemp("report")
    report.write_report(folder, results, history(), SHARES, predictions)
    return folder


def test_the_answer_names_everything_that_it_rests_on(run, found):
    results, predictions = run
    difference = found.row("merged").difference
    best, merged, ensemble = (
        found.row(key).test.estimate for key in ("parent_1", "merged", "ensemble")
    )
    assert difference.p_value < 0.001
    assert report.answer(results, predictions) == (
        f"Test accuracy on 400 held-out images: merged {100 * merged:.1f} % against "
        f"{100 * best:.1f} % for the best parent (number 1, chosen on validation), "
        f"+{100 * difference.estimate:.1f} points "
        f"[{100 * difference.low:.1f}, {100 * difference.high:.1f}], p < 0.001 "
        f"(exact McNemar test); ensemble {100 * ensemble:.1f} %."
    )
    untested = report.answer(results)
    assert f"+{100 * difference.estimate:.1f} points; ensemble" in untested
    assert "p " not in untested.split("points")[1]


def test_the_answer_over_seeds(run):
    combined = aggregate([planted_run(seed)[0] for seed in range(3)])
    difference = combined["networks"]["merged"]["difference"]
    answer = report.answer(combined)
    assert answer.startswith("Test accuracy over 3 seeds, 400 held-out images each: merged ")
    assert (
        f"+{100 * difference['estimate']:.1f} points [{100 * difference['low']:.1f}, "
        f"{100 * difference['high']:.1f}], {text.p_value(difference['p_value'])} "
        "(t-test paired by seed)"
    ) in answer
    single = report.answer(aggregate([run[0]]))
    assert "points; ensemble" in single
    assert "nan" not in single


def test_the_terminals_table_fits_into_80_columns(run):
    header, *body = report.rows(*run)
    assert header == ("network", "validation", "test", "to best parent [points]", "p (Holm)")
    widths = [max(map(len, column)) for column in zip(*body, strict=True)]
    assert sum(widths) + 3 * len(widths) + 1 <= 80
    assert [row[0] for row in body][-1] == "merged"
    assert body[1][0] == "parent 1 (best)"
    assert header[:3] == report.rows(run[0])[0]


def test_the_full_table_and_the_budgets(run, found):
    header, *body = text.table(found, full=True)
    merged = dict(zip(header, body[-1], strict=True))
    row = found.row("merged")
    assert merged == {
        "network": "merged",
        "validation [95 %]": "83.0 % [77.2, 87.6]",
        "test [95 %]": text.with_interval(row.test),
        "to best parent [points]": text.points(row.difference),
        "p (Holm)": "< 0.001",
        "NLL [nats]": "0.360",
        "calibration error": "5.0 %",
        "networks x images scored": "96 x 200",
    }
    assert text.budgets(found) == (
        "The merged network's search scored 96 x 200 networks x images; the same budget had "
        "random search."
    )
    results = json.loads(json.dumps(run[0]))
    results["baselines"]["random_search"]["images_scored"] = 100
    assert text.budgets(comparison(results)) == (
        "The merged network's search scored 96 x 200 networks x images; another one had "
        "random search 96 x 100."
    )
    # Paid for by the image and by the network, budgets are the same up to one network.
    results["baselines"]["random_search"]["images_scored"] = 200
    for evaluations, images, said in ((400, 47.75, "400 x 47.8"), (96, 197, "96 x 197")):
        results["merged"] |= {"evaluations": evaluations, "images_scored": images}
        assert text.budgets(comparison(results)) == (
            f"The merged network's search scored {said} networks x images; "
            + (
                "the same budget had random search."
                if evaluations == 400
                else "another one had random search 96 x 200."
            )
        )
    del results["baselines"]["random_search"]["evaluations"]
    assert text.budgets(comparison(results)) is None


def test_small_negative_numbers_do_not_read_as_minus_zero():
    assert text.with_interval(Interval(0.5, -0.0001, 0.6)) == "50.0 % [0.0, 60.0]"
    assert (
        text.points(
            comparison(*planted_run(0))
            .row("merged")
            .difference._replace(estimate=0.0, low=-0.0004, high=0.0004)
        )
        == "+0.0 [0.0, 0.0]"
    )


def test_tables_of_corruptions_and_agreement(run, found):
    results = run[0]
    header, *body = text.robust_table(found, results["robustness"])
    merged = dict(zip(header, body[-1], strict=True))
    share = results["merged"]["test_accuracy"]
    assert merged["mean over corruptions"] == f"{85 * share:.1f} %"
    assert merged["shot noise"] == merged["contrast"] == f"{85 * share:.1f} %"
    assert merged["to best parent [points]"] == text.points(
        found.row("merged").corrupted_difference
    )
    from megajax.evaluation.results import entries

    header, *body = text.agreement_table(found, entries(results))
    assert header == ("network", "with parent 0", "with parent 1")
    assert body[0][:2] == ("parent 0", "100.0 %")
    assert text.agreement_table(found, {row.key: {} for row in found.rows}) == []


def test_the_files_of_a_report(folder, run, found):
    assert {path.name for path in (folder / "plots").iterdir()} == {
        f"{name}.{kind}" for name in PICTURES for kind in ("png", "pdf")
    }
    for name in PICTURES:
        with Image.open(folder / "plots" / f"{name}.png") as picture:
            assert min(picture.size) > 200
        assert (folder / "plots" / f"{name}.pdf").read_bytes().startswith(b"%PDF-")
    page = (folder / "report.md").read_text()
    answer = report.answer(*run)
    assert page.index(f"**{answer}**") < page.index("## All methods")
    assert set(re.findall(r"\]\(plots/(\w+)\.png\)", page)) == PICTURES
    assert report.NOT_HELD_OUT not in page
    assert text.with_interval(found.row("merged").validation) in page


def test_the_same_results_give_the_same_bytes():
    for kind in ("png", "pdf", "svg"):
        first, second = (plots.rendered(plots.plot_mask(SHARES), kind) for _ in range(2))
        assert first == second


def test_what_was_not_measured_is_left_out(tmp_path):
    minimal = {"validation_accuracy": 0.5, "test_accuracy": 0.25}
    data = {"name": "<b>", "validation": 10, "test": 20}
    results = {"parents": [minimal], "merged": minimal, "data": data, "not_held_out": True}
    report.write_report(tmp_path, results)
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {"accuracy"}
    markdown = (tmp_path / "report.md").read_text()
    page = (tmp_path / "report.html").read_text()
    assert f"**{report.NOT_HELD_OUT}**" in markdown
    assert f'<p class="strong">{report.NOT_HELD_OUT}</p>' in page
    assert "Accuracy on 20 test images that the search itself was scored on: merged" in markdown
    assert "the test images were looked at once" not in markdown
    assert "<h1>Merged networks on &lt;b&gt;</h1>" in page
    for absent in ("Corrupted", "The search\n", "nan", "None"):
        assert absent not in markdown


class Elements(HTMLParser):
    """Checks that every element is closed, and collects all that a browser would fetch."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.names = [], [], []

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href", "srcset")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_fetches_nothing(folder):
    page = (folder / "report.html").read_text()
    elements = Elements()
    elements.feed(page)
    assert elements.open == []
    assert len(elements.fetched) == elements.names.count("img") == len(PICTURES)
    assert all(value.startswith("data:image/svg+xml;base64,") for value in elements.fetched)
    assert not {"script", "link", "iframe"} & set(elements.names)
    assert "://" not in page
    assert "url(" not in page
    assert "@import" not in page


BROWSERS = (
    "chromium-headless-shell",
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
    "chrome",
)
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_a_browser_shows_the_page(folder, tmp_path):
    """The page is given a script that writes down what the browser made of it."""
    probe = """<script>
      const errors = [];
      addEventListener("error", e => errors.push(e.message || e.target.outerHTML), true);
      addEventListener("load", () => {
        const seen = {
          errors, mode: document.compatMode, title: document.title,
          pictures: [...document.images].map(i => i.complete && i.naturalWidth),
          fetched: performance.getEntriesByType("resource").map(e => e.name)
            .filter(name => !name.startsWith("data:")),
          rows: document.querySelectorAll("tbody tr").length,
          overflow: document.documentElement.scrollWidth - innerWidth,
        };
        document.body.innerHTML = "<pre>" + JSON.stringify(seen) + "</pre>";
      });
    </script></head>"""
    page = (folder / "report.html").read_text().replace("</head>", probe)
    (tmp_path / "page.html").write_text(page)
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    arguments += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=10000"]
    done = subprocess.run(
        [BROWSER, *arguments, "--dump-dom", (tmp_path / "page.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    seen = json.loads(re.search(r"<body><pre>(.*)</pre>", done.stdout).group(1))
    assert seen["errors"] == []
    assert seen["fetched"] == []
    assert seen["mode"] == "CSS1Compat"
    assert seen["title"] == "Merged networks on planted"
    assert len(seen["pictures"]) == len(PICTURES)
    assert min(seen["pictures"]) > 200
    assert seen["rows"] == 3 * 6
    assert seen["overflow"] <= 0


def test_blocks_as_markdown_and_html():
    blocks = [
        Heading("A & B"),
        Paragraph("plain"),
        Table([("name", "x"), ("one", "1"), ("merged", "2")], strong=("merged",)),
        Picture("dot", "a dot"),
    ]
    markdown = to_markdown(blocks)
    assert "| name | x |\n| --- | ---: |\n| one | 1 |\n| **merged** | **2** |" in markdown
    assert "![a dot](plots/dot.png)" in markdown
    page = to_html(blocks, {"dot": b"<svg/>"})
    assert "<h1>A &amp; B</h1>" in page
    assert '<tr class="strong"><th scope="row">merged</th><td>2</td></tr>' in page


# What is drawn ----------------------------------------------------------------------------------


def lines(axes):
    return {line.get_label(): line.get_ydata() for line in axes.get_lines()}


def test_fitness_is_drawn_as_it_went():
    figure = plots.plot_fitness(history(), "negative cross-entropy [nats]")
    (axes,) = figure.axes
    drawn = [line.get_ydata() for line in axes.get_lines()]
    np.testing.assert_allclose(drawn[0], [row["median"] for row in history()])
    np.testing.assert_allclose(drawn[1], [row["best_ever"] for row in history()])
    assert axes.get_ylabel() == "fitness: negative cross-entropy [nats]"
    assert axes.get_xlabel() == "generation"
    # A search of no generations, and one whose fitness never moved, are drawn too.
    for few in (history(0), [row | {"best_ever": -1, "median": -1} for row in history(1)]):
        assert isinstance(plots.plot_fitness(few), Figure)


def test_accuracies_and_differences_are_drawn_with_their_intervals(found):
    figure = plots.plot_accuracy(found)
    accuracy, difference = figure.axes
    merged = found.row("merged")
    drawn = [tuple(line.get_xdata()) for line in accuracy.get_lines()]
    assert tuple(100 * np.array(merged.test[1:])) in drawn
    assert tuple(100 * np.array(merged.validation[1:])) in drawn
    drawn = [tuple(line.get_xdata()) for line in difference.get_lines()]
    assert tuple(100 * np.array(merged.difference[1:3])) in drawn
    assert [label.get_text() for label in accuracy.get_yticklabels()] == [
        row.name for row in found.rows
    ]
    assert "[%]" in accuracy.get_xlabel()
    assert "[points]" in difference.get_xlabel()


def test_masks_are_drawn_channel_by_channel():
    two, bar = plots.plot_mask(SHARES).axes
    images = [image.get_array() for image in two.get_images()]
    np.testing.assert_allclose(images[0], [[0.1, 0.5, 0.8]])
    np.testing.assert_allclose(images[2], [[0.75]])
    assert [label.get_text() for label in two.get_yticklabels()] == list(SHARES)
    assert bar.get_ylabel() == "share of parent 1"
    *panels, _ = plots.plot_mask({"layer": np.eye(3)}).axes
    assert [panel.get_title() for panel in panels] == ["parent 0", "parent 1", "parent 2"]
    deep = plots.plot_mask({f"layer{i}": [0.5, 0.5] for i in range(200)})
    assert deep.get_size_inches()[1] < 20
    labels = [label.get_text() for label in deep.axes[0].get_yticklabels()]
    assert labels == [f"layer{i}" for i in range(0, 200, 3)]


def test_the_star_on_the_path_is_the_merged_network(run):
    path = run[0]["path"]
    accuracy, nll = plots.plot_path(path).axes
    np.testing.assert_allclose(lines(accuracy)["as they are"], [70, 20, 74])
    np.testing.assert_allclose(lines(accuracy)["merged"], [80])
    np.testing.assert_allclose(lines(nll)["merged"], [0.9])
    assert "[nats]" in nll.get_ylabel()
    assert "[%]" in accuracy.get_ylabel()
    broken = json.loads(json.dumps(path))
    broken["merged"]["nll"] = broken["lines"]["as they are"][1]["nll"] = None
    assert "merged" not in lines(plots.plot_path(broken).axes[1])


def test_classes_few_and_many():
    few = {"parent_0": [0.5, None, 1.0], "merged": [0.6, 0.7, 0.8]}
    (axes,) = plots.plot_per_class(few, ["cat", "dog", "horse"]).axes
    np.testing.assert_allclose(lines(axes)["parent 0"], [50, np.nan, 100])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["cat", "dog", "horse"]
    rng = np.random.default_rng(0)
    many = {"parent_0": rng.random(100).tolist(), "merged": rng.random(100).tolist()}
    (axes,) = plots.plot_per_class(many).axes
    np.testing.assert_allclose(lines(axes)["merged"], 100 * np.sort(many["merged"]))
    order = np.argsort(many["merged"])
    np.testing.assert_allclose(lines(axes)["parent 0"], 100 * np.array(many["parent_0"])[order])


def test_robustness_starts_at_the_clean_accuracy(run):
    robustness = run[0]["robustness"]
    keys = ["parent_0", "merged"]
    figure = plots.plot_robustness(robustness, {"parent_0": 0.7, "merged": 0.8}, keys=keys)
    mean, *each = (axes for axes in figure.axes if axes.get_visible())
    assert [axes.get_title() for axes in each] == [name.replace("_", " ") for name in CORRUPTIONS]
    values = robustness["networks"]["merged"]["accuracy"]["contrast"]
    np.testing.assert_allclose(lines(each[1])["merged"], [80, *(100 * np.array(values))])
    np.testing.assert_allclose(lines(mean)["merged"], [80, *(100 * np.array(values))])
    assert mean.get_lines()[0].get_xdata().tolist() == [0, 1, 5]
