"""The report: what it says, what it draws, and that a browser can show it with no network."""

import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from planted_runs import CORRUPTIONS, SHARES, history, planted_run
from rich.console import Console
from scipy import special

import megajax as mj
from megajax import report
from megajax.evaluation.results import aggregate, comparison, entries
from megajax.evaluation.statistics import Interval
from megajax.report import plots, text
from megajax.report.page import Heading, Paragraph, Picture, Table, show, to_html, to_markdown

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
    best, merged, ensemble, average = (
        100 * found.row(key).test.estimate
        for key in ("parent_1", "merged", "ensemble", "uniform_average")
    )
    rivals = {rival.role: rival.difference for rival in found.rivals}
    assert rivals["best"] == found.row("merged").difference

    def points(role):
        limits = (100 * value for value in rivals[role][:3])
        return "{:+.1f} points [{:.1f}, {:.1f}], p < 0.001".format(*limits)

    assert report.answer(results, predictions) == (
        f"Test accuracy on 400 held-out images: merged {merged:.1f} % against {best:.1f} % for the "
        f"best parent (number 1, chosen on validation), {points('best')} (exact McNemar test). "
        f"Against the best method without a search (average, chosen on validation, {average:.1f} "
        f"%): {points('without search')}. Against the ensemble, which costs 2 networks "
        f"({ensemble:.1f} %): {points('ensemble')}."
    )
    untested = report.answer(results)
    assert f"{merged - best:+.1f} points. Against" in untested
    assert "p " not in untested.split("points")[1]
    swapped = json.loads(json.dumps(results))
    swapped["parents"][0]["validation_accuracy"] = 0.99
    assert f"Against the best parent on test (number 1, {best:.1f} %): " in report.answer(swapped)


def test_the_answer_over_seeds(run):
    runs = [planted_run(seed)[0] for seed in range(5)]
    combined = aggregate(runs)
    difference = combined["networks"]["merged"]["difference"]
    answer = report.answer(combined)
    assert answer.startswith("Test accuracy over 5 seeds, 400 held-out images each: merged ")
    assert (
        f"+{100 * difference['estimate']:.1f} points [{100 * difference['low']:.1f}, "
        f"{100 * difference['high']:.1f}], {text.p_value(difference['p_value'])} "
        "(t-test paired by seed)"
    ) in answer
    # Of fewer seeds each is shown, and nothing is tested.
    few = report.answer(aggregate(runs[:3]))
    gains = [
        100 * (one["merged"]["test_accuracy"] - one["parents"][1]["test_accuracy"])
        for one in runs[:3]
    ]
    assert f"points ({', '.join(f'{gain:+.1f}' for gain in gains)})." in few
    assert "t-test" not in few
    assert "nan" not in few + report.answer(aggregate([run[0]]))


def test_what_a_reader_must_know_first(run, found):
    results = run[0]
    assert text.caveats(found, results) == []
    marks = {"smoke": True, "returned_parent": 0, "still_rising": True}
    assert text.caveats(found, results | marks) == [
        text.SMOKE,
        "The search returned parent 0: it found no mixture that scored better.",
        "Fitness was still rising when the search ended: a longer one may find more.",
    ]
    runs = [planted_run(seed)[0] for seed in range(3)]
    combined = aggregate([runs[0] | marks, runs[1] | {"returned_parent": 1}, runs[2]])
    assert text.caveats(comparison(combined), combined) == [
        text.SMOKE,
        "For 2 of 3 seeds: The search returned a parent: it found no mixture that scored better.",
        "For 1 of 3 seeds: Fitness was still rising when the search ended: a longer one may find "
        "more.",
    ]
    assert text.caveats(comparison(aggregate(runs)), aggregate(runs)) == []


@pytest.mark.parametrize("width", [60, 80])
def test_a_terminal_breaks_no_word(run, width):
    console = Console(width=width, file=io.StringIO())
    blocks = report.summary(run[0] | {"smoke": True}, run[1])
    show(blocks, console)
    printed = console.file.getvalue()
    assert max(map(len, printed.splitlines())) <= width
    table, *paragraphs = blocks
    words = [word for block in paragraphs for word in block.text.split()]
    assert set(words) <= set(printed.split())
    assert table.rows[0] == ("network", "test", "to best parent [points]", "p (Holm)", "validation")
    titles = [row[0] for row in table.rows if len(row) == 1]
    assert titles == ["Parents", "Without search", "By search", "Ensemble"]
    assert all(name in printed for name in ("parent 1 (chosen", "merged"))


def test_the_full_table_and_the_budgets(run, found):
    merged = row_of(text.table(found, full=True), "merged")
    row = found.row("merged")
    assert merged == {
        "network": "merged",
        "validation [95 %]": "83.0 % [77.2, 87.6]",
        "test [95 %]": text.with_interval(row.test),
        "to best parent [points]": text.points(row.difference),
        "p (Holm)": "< 0.001",
        "NLL [nats]": "0.360",
        "calibration error": "5.0 %",
        "saw labels": "yes",
        "networks x images scored": "96 x 200",
    }
    assert text.budgets(found) == (
        "The merged network's search scored 96 x 200 networks x images; random search "
        "had the same budget."
    )
    results = json.loads(json.dumps(run[0]))
    results["baselines"]["random_search"]["images_scored"] = 100
    assert text.budgets(comparison(results)) == (
        "The merged network's search scored 96 x 200 networks x images; other budgets: "
        "random search 96 x 100."
    )
    # Paid for by the image and by the network, budgets are the same up to one network.
    results["baselines"]["random_search"]["images_scored"] = 200
    for evaluations, images, said in ((400, 47.75, "400 x 47.8"), (96, 197, "96 x 197")):
        results["merged"] |= {"evaluations": evaluations, "images_scored": images}
        assert text.budgets(comparison(results)) == (
            f"The merged network's search scored {said} networks x images; "
            + (
                "random search had the same budget."
                if evaluations == 400
                else "other budgets: random search 96 x 200."
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
    merged = row_of(text.robust_table(found, results["robustness"]), "merged")
    share = results["merged"]["test_accuracy"]
    assert merged["mean over corruptions"] == f"{85 * share:.1f} %"
    assert merged["shot noise"] == merged["contrast"] == f"{85 * share:.1f} %"
    assert merged["to best parent [points]"] == text.points(
        found.row("merged").corrupted_difference
    )
    table = text.agreement_table(found, entries(results))
    assert table[0] == ("network", "with parent 0", "with parent 1")
    assert row_of(table, "parent 0")["with parent 0"] == "100.0 %"
    assert text.agreement_table(found, {row.key: {} for row in found.rows}) == []


def row_of(table, name):
    header, *body = table
    (row,) = (row for row in body if row[0] == name and len(row) > 1)
    return dict(zip(header, row, strict=True))


def test_what_was_run(run):
    rows = dict(text.run_table(run[0] | {"settings": {"network": "cnn"}}))
    assert rows["data"].startswith("planted: 1,000 training, 200 validation and 400 test images")
    assert rows["network"] == "cnn"
    assert rows["cost of the search"] == "5 generations, 96 networks scored"
    assert rows["seconds"] == "training 1, search 2"
    assert rows["seed"] == "0"
    combined = aggregate([planted_run(seed)[0] for seed in range(3)])
    assert dict(text.run_table(combined))["seeds"] == "0, 1, 2"


def test_the_files_of_a_report(folder, run, found):
    assert {path.name for path in (folder / "plots").iterdir()} == {
        f"{name}.{kind}" for name in PICTURES for kind in ("png", "pdf")
    }
    for name in PICTURES:
        with Image.open(folder / "plots" / f"{name}.png") as picture:
            assert min(picture.size) > 200
        assert (folder / "plots" / f"{name}.pdf").read_bytes().startswith(b"%PDF-")
    page = (folder / "report.md").read_text()
    first, *others = text.headline(found)
    assert page.index(f"**{first}**") < page.index(others[-1]) < page.index("## All methods")
    assert set(re.findall(r"\]\(plots/(\w+)\.png\)", page)) == PICTURES
    assert text.NOT_HELD_OUT not in page
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
    assert f"**{text.NOT_HELD_OUT}**" in markdown
    assert f'<p class="strong">{text.NOT_HELD_OUT}</p>' in page
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


def browsed(page, folder, width=1280):
    """What the page writes of itself, in a frame of some width: a window is never narrow."""
    (folder / "page.html").write_text(page)
    (folder / "frame.html").write_text(
        f'<body><iframe src="page.html" style="border: 0; width: {width}px; height: 800px">'
        "</iframe><script>addEventListener('message', e => "
        "{ document.body.textContent = e.data })</script>"
    )
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    arguments += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000"]
    arguments += ["--window-size=1400,900", "--dump-dom", (folder / "frame.html").as_uri()]
    done = subprocess.run(
        [BROWSER, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(html.unescape(re.search(r"<body>(.*)</body>", done.stdout).group(1)))


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
        };
        parent.postMessage(JSON.stringify(seen), "*");
      });
    </script></head>"""
    page = (folder / "report.html").read_text().replace("</head>", probe)
    seen = browsed(page, tmp_path)
    assert seen["errors"] == []
    assert seen["fetched"] == []
    assert seen["mode"] == "CSS1Compat"
    assert seen["title"] == "Merged networks on planted"
    assert len(seen["pictures"]) == len(PICTURES)
    assert min(seen["pictures"]) > 200
    assert seen["rows"] == 3 * (6 + 4) + 4  # networks and groups; what was run


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_runs_over_the_page_and_the_first_column_stays(folder, tmp_path, width):
    probe = """<script>
      addEventListener("load", () => {
        const box = document.querySelector("div.scroll");
        const [name, test] = document.querySelectorAll("tbody tr:nth-child(2) > *");
        const shown = test.getBoundingClientRect().right;
        box.scrollLeft = 1000;
        parent.postMessage(JSON.stringify({
          overflow: document.documentElement.scrollWidth - innerWidth,
          over: [...document.querySelectorAll("body > *, figcaption")]
            .filter(e => e.getBoundingClientRect().right > innerWidth).map(e => e.outerHTML),
          cut: Math.max(...[...document.querySelectorAll("div.scroll")]
            .map(e => e.scrollWidth - e.clientWidth)),
          shown, first: name.getBoundingClientRect().left,
          left: box.getBoundingClientRect().left,
        }), "*");
      });
    </script></head>"""
    page = (folder / "report.html").read_text().replace("</head>", probe)
    seen = browsed(page, tmp_path, width)
    assert seen["overflow"] <= 0
    assert seen["over"] == []
    assert seen["shown"] <= width  # the column of the test accuracy
    assert seen["first"] == seen["left"]
    assert (seen["cut"] > 0) == (width == 390)


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
    assert '<tr class="strong"><th scope="row">merged</th><td class="right">2</td></tr>' in page


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
    (axes,) = plots.plot_fitness(history(), parents=[-1.2, None, -50]).axes
    levels = [line.get_ydata()[0] for line in axes.get_lines()[2:]]
    assert levels == [-1.2, -50]
    low, high = axes.get_ylim()
    assert -50 < low < -1.2 < high  # the best parent is in the picture
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
    titles = {group.capitalize() for group, _ in found.groups()}
    labels = [label.get_text() for label in accuracy.get_yticklabels()]
    assert [name for name in labels if name not in titles] == [
        row.name for _, rows in found.groups() for row in rows
    ]
    assert labels[0] == "Parents"
    assert "[%]" in accuracy.get_xlabel()
    assert "[points]" in difference.get_xlabel()


@pytest.mark.slow
def test_a_front_is_drawn_with_everybody_else(tmp_path, run):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 4)).astype(np.float32)
    parents = [{"w": rng.normal(size=(4, 3)).astype(np.float32)} for _ in range(2)]
    labels = [(x @ parent["w"]).argmax(1) for parent in parents]
    found = mj.merge(
        jax.random.key(0),
        _linear,
        parents,
        [mj.Task(x, y, metric="accuracy", name=n) for n, y in zip("ab", labels, strict=True)],
        align=mj.AlignConfig(method="none"),
        evolution=mj.EvolutionConfig(method="nsga2", population_size=8, generations=3),
    )
    average = {"w": (parents[0]["w"] + parents[1]["w"]) / 2}
    front = report.front(found, {"uniform_average": average})

    def accuracies(logits):
        return [np.mean(logits.argmax(1) == y) for y in labels]

    softmax = [special.softmax(x @ parent["w"], axis=1) for parent in parents]
    expected = {
        "parent_0": accuracies(softmax[0]),
        "parent_1": accuracies(softmax[1]),
        "uniform_average": accuracies(x @ average["w"]),
        "ensemble": accuracies(sum(softmax)),
        "merged": list(found.scores.values()),
    }
    assert list(front["networks"]) == list(expected)
    for name, scores in expected.items():
        np.testing.assert_allclose(front["networks"][name], scores, atol=1e-6)
    np.testing.assert_allclose(front["points"], found.front.scores)
    (axes,) = plots.plot_front(front).axes
    drawn = {line.get_label(): line.get_xydata() for line in axes.get_lines()}
    np.testing.assert_allclose(sorted(drawn["front"][:, 0]), sorted(found.front.scores[:, 0]))
    np.testing.assert_allclose(drawn["parent 0"], [expected["parent_0"]], atol=1e-6)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("a: accuracy", "b: accuracy")
    assert report.front(found._replace(front=None)) is None
    report.write_report(tmp_path, run[0] | {"front": front})
    assert "plots/front.png" in (tmp_path / "report.md").read_text()


def _linear(variables, inputs):
    return inputs @ variables["w"]


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
