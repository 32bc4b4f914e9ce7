"""The page about a zoo: whole, self-contained, escaped, and true."""

import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml

from weightspace.errors import OutputError
from weightspace.nets import MLP
from weightspace.testing import tiny_zoo
from weightspace.zoo import Zoo, report_zoo
from weightspace.zoo.pictures._html import Html, element
from weightspace.zoo.pictures._style import STYLE, new_figure, to_svg
from weightspace.zoo.pictures._summary import Summary, short

VOID = {"meta", "br"}
NASTY = "<script>alert('1')</script>&\"$x$"


class Page(HTMLParser):
    """The elements of a page; fails where they are not nested as they should be."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.texts, self.cells = [], [], [], {}, []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)
        if "td" in self.open or "th" in self.open:
            self.cells[-1][-1] += data

    def row(self, name):
        """The cells of the row that begins with a name."""
        (found,) = [row[1:] for row in self.cells if row and row[0] == name]
        return found

    def values(self, name):
        return [value for _, attribute, value in self.attributes if attribute == name]


def page_of(zoo, folder):
    text = report_zoo(zoo, folder / "zoo.html", overwrite=True).read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def zoos(made):
    """Zoos of every kind; the first has a NaN at the end of network 1, and two networks that diverged."""
    cnn = made.zoo(networks=30, diverged=[1, 5])
    cnn["cnn"].metrics["test_loss"][7] = np.nan
    mlp = MLP((64, 4, 10), activation="relu", input_shape=(1, 8, 8))
    mlps = {"a": made.population(made.mlp(), networks=20), "b": made.population(mlp, networks=12, seed=1)}
    rnn = made.zoo(made.rnn(), networks=12, hyperparameters={})
    mixed = Zoo(
        {"cnn": made.population(made.cnn(), networks=9), **tiny_zoo(6).populations}, tiny_zoo(6).sources
    )
    return {"cnn": cnn, "mlps": Zoo(mlps), "rnn": rnn, "inr": tiny_zoo(12), "mixed": mixed}


@pytest.fixture(scope="module")
def pages(zoos, tmp_path_factory):
    """Their pages, each made once: text and elements. That of the first is of the file."""
    folder = tmp_path_factory.mktemp("pages")
    zoos["cnn"] = Zoo.open(zoos["cnn"].save(folder / "mine.h5"))
    return {name: page_of(zoo, folder) for name, zoo in zoos.items()}


KINDS = ("cnn", "mlps", "rnn", "inr", "mixed")


@pytest.mark.parametrize("kind", KINDS)
def test_needs_nothing_else(pages, kind):
    text, page = pages[kind]
    assert text.startswith("<!DOCTYPE html>")
    assert "http" not in text
    assert not {"script", "link", "iframe", "object", "embed", "img", "base", "form"} & set(page.tags)
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    for name in ("src", "href", "xlink:href"):
        assert all(value.startswith(("#", "data:image/png;base64,")) for value in page.values(name))
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_reference_is_defined_once(pages, kind):
    text, page = pages[kind]
    names = page.values("id")
    assert [name for name, times in Counter(names).items() if times > 1] == []
    used = {value[1:] for value in page.values("href") + page.values("xlink:href") if value.startswith("#")}
    used |= set(re.findall(r"url\(#([^)]+)\)", text))
    assert used
    assert used <= set(names)


def test_names_are_text(made, tmp_path):
    population = made.population(made.cnn(), networks=20, choices={"optimizer": [NASTY, "adam", "b"]})
    population = replace(
        population,
        hyperparameters={**population.hyperparameters, NASTY: np.linspace(0, 1, 20)},
        metrics={**population.metrics, f"{NASTY}2": np.linspace(0, 1, 80, dtype=np.float32)},
        labels={f"{NASTY}3": np.arange(20) % 2},
    )
    zoo = Zoo({f"{NASTY}4": population}, recipe={"name": NASTY, "seed": 3})
    text, page = page_of(zoo, tmp_path)
    assert "<script" not in text
    assert "alert" in text
    assert page.texts["title"] == [NASTY]
    assert page.texts["h1"] == [NASTY]
    assert page.row(f"{NASTY}4")[0] == "20"
    assert "+1.00" in page.row(NASTY)  # with the metric of the same order
    assert f"{NASTY}2" in [row[0] for row in page.cells]


def test_what_the_zoo_says_of_itself(zoos, pages):
    zoo, page = zoos["cnn"], pages["cnn"][1]
    said = " ".join(page.texts["dd"])
    assert zoo.digest in page.texts["code"]
    assert "30 in 1 population, 120 checkpoints" in said
    assert "made-up" in said
    assert "mine.h5, " in said
    assert "zoo file, version 1" in said
    assert re.search(r"numpy [\d.]+.*torch [\d.]+.*weightspace [\d.]+", said)
    median = short(float(np.median(zoo["cnn"].metrics["test_accuracy"][3::4])))
    counts = ["30", "120", "203", "15", "6", "9", "2"]
    assert page.row("cnn")[:8] == [*counts, f"test_accuracy {median}"]


def test_quantiles_are_those_of_the_last_checkpoints(zoos, pages):
    zoo, page = zoos["cnn"], pages["cnn"][1]
    levels = [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]
    accuracy, loss = (
        zoo["cnn"].metrics[name][3::4].astype(np.float64) for name in ("test_accuracy", "test_loss")
    )
    quantiles = {row[0]: row[1:] for row in page.cells if len(row) == 9}
    assert quantiles["metric"] == ["min", "5%", "25%", "50%", "75%", "95%", "max", "not finite"]
    assert quantiles["test_accuracy"] == [*(short(value) for value in np.quantile(accuracy, levels)), "0"]
    assert quantiles["test_loss"] == [*(short(value) for value in np.nanquantile(loss, levels)), "1"]


def test_correlations_are_those_of_the_table(zoos, pages):
    from scipy.stats import spearmanr

    summary, page = Summary.of(zoos["cnn"].populations), pages["cnn"][1]
    head = next(row for row in page.cells if row[0] == "")
    assert head[1:] == [
        "diverged",
        "test_accuracy",
        "test_loss",
    ]  # but not the epoch, which is the same for all
    dropout = summary.hyperparameters["dropout"].values
    expected = [spearmanr(dropout, summary.metrics[name], nan_policy="omit").statistic for name in head[1:]]
    found = [float(cell.replace("\u2212", "-")) for cell in page.row("dropout")]
    assert found == pytest.approx(expected, abs=0.0051)
    assert page.row("learning_rate")[1:] == ["+1.00", "\u22121.00"]
    assert all(cell.startswith("η² 0.") for cell in page.row("optimizer"))


def test_recipe_and_protocol_can_be_read_again(made, tmp_path):
    recipe = {
        "name": "x",
        "seed": 1,
        "source": {"kind": "digits"},
        "rate": {"log_uniform": [1e-4, 0.1]},
        "none": None,
    }
    zoo = replace(made.zoo(networks=2, hyperparameters={}), recipe=recipe)
    _, page = page_of(zoo, tmp_path)
    assert [yaml.safe_load(text) for text in page.texts["pre"]] == [dict(zoo["cnn"].protocol), recipe]


def test_sections_follow_what_is_there(pages):
    headings = {kind: page.texts["h2"] for kind, (_, page) in pages.items()}
    for _, page in pages.values():
        assert page.tags.count("svg") == page.tags.count("figure") == page.tags.count("figcaption")
    assert headings["cnn"] == [
        "Populations",
        "Protocol and recipe",
        "Accuracies and learning curves",
        "Hyperparameters",
        "Hyperparameters and metrics",
        "Weights in the plane",
        "Samples",
        "Metrics and labels",
    ]
    assert "Samples" not in headings["rnn"]
    assert "Hyperparameters" not in headings["rnn"]
    assert {"Weights in the plane", "Samples"} <= set(headings["inr"])
    assert {"Samples (classifiers)", "Samples (INRs)"} <= set(headings["mixed"])


def test_constant_and_numbered_hyperparameters_are_named(pages):
    _, page = pages["cnn"]
    assert "epochs = 10" in page.texts["code"]
    assert "Another value for every network: seed." in page.texts["p"]


def test_shared_arguments_are_said_once(pages):
    _, page = pages["mlps"]
    assert page.row("a")[-1] == "mlp(widths=[64, 16, 10])"
    assert any("input_shape=[1, 8, 8]" in text for text in page.texts["code"])
    assert page.row("all")[:2] == ["32", "128"]


def test_inrs_without_signals_are_explained(tmp_path):
    zoo = replace(tiny_zoo(), sources={})
    _, page = page_of(zoo, tmp_path)
    assert any("inr cannot be shown: zoo : stores no source signals" in text for text in page.texts["p"])


def test_networks_without_any_knowledge(tmp_path):
    bare = {"net": replace(tiny_zoo()["inr"], metrics={}, labels={}, architecture=None, protocol={})}
    _, page = page_of(Zoo(bare), tmp_path)
    assert page.texts["h2"] == ["Populations", "Protocol and recipe", "Weights in the plane"]
    assert page.row("net")[-1] == "foreign"


def test_equal_zoos_give_equal_pages(pages, tmp_path):
    assert page_of(tiny_zoo(12), tmp_path)[0] == pages["inr"][0]


def test_existing_files_are_kept(made, tmp_path):
    path = tmp_path / "zoo.html"
    path.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        report_zoo(tiny_zoo(), path)
    assert path.read_text() == "mine"
    with pytest.raises(OutputError, match="does not exist"):
        report_zoo(tiny_zoo(), tmp_path / "no" / "zoo.html")
    assert report_zoo(tiny_zoo(), path, overwrite=True) == path
    assert [entry.name for entry in tmp_path.iterdir()] == ["zoo.html"]


# -- what pages are made of ----------------------------------------------------------------------------------


def test_figures_take_the_ink_of_the_page():
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        figure = new_figure(3.0, 2.0)
        figure.subplots().set(xlabel="a $b$ <c>", title="-->")
        svg = to_svg(figure, 'what "it" shows', "one-")
    assert svg.startswith('<svg viewBox="0 0 216 144" role="img" aria-label="what &quot;it&quot; shows"')
    assert "currentColor" in svg
    assert "#1a1b1d" not in svg
    assert "<!--" not in svg
    assert "<c>" not in svg
    assert all(name.startswith("one-") for name in Page(svg).values("id"))


def test_text_is_escaped_and_elements_are_not():
    assert (
        element("p", "<b>", element("b", '"&"'), title='"<')
        == '<p title="&quot;&lt;">&lt;b&gt;<b>&quot;&amp;&quot;</b></p>'
    )
    assert element("td", Html("<i></i>"), 3) == "<td><i></i>3</td>"
    assert element("meta", charset="utf-8", name_=None) == '<meta charset="utf-8">'
