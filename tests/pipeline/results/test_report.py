from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipeline.cohort.table import Cohort
from pipeline.inference.prediction import load_model
from pipeline.results.evaluate import evaluate
from pipeline.results.report import render_report
from tests.pipeline.small import small_config, store_slides, write_cohort, write_model

LABELS = ("no", "yes", "yes", "no", "no", "yes", None)


class Page(HTMLParser):
    """Sources of images and links, and the open tags left at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.depth: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in {"src", "href"}]
        if tag not in {"img", "meta", "br"}:
            self.depth.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.depth.pop() == tag


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    config = small_config()
    cohort = write_cohort(folder, LABELS)
    odd = tuple(
        replace(slide, slide_id="<script>x" if slide.slide_id == "s1" else slide.slide_id) for slide in cohort.slides
    )
    cohort = Cohort(cohort.uri, odd)
    model, _ = load_model(write_model(folder, config))
    result = evaluate(model, config, store_slides(cohort, folder / "store", config), {"tumour": 0.45})
    return render_report(result, config, cohort, {"Git commit": "abc123"})


def test_the_page_is_well_formed_and_needs_nothing_else(html: str) -> None:
    page = Page()
    page.feed(html)
    assert page.depth == []
    assert page.sources
    assert all(source.startswith("data:image/") for source in page.sources)
    assert "http" not in re.sub(r'"data:[^"]*"', "", html).replace("https://", "http")


def test_it_shows_numbers_lineage_config_and_every_labelled_slide(html: str) -> None:
    assert "95% interval" in html
    assert "abc123" in html
    assert "&#34;memory&#34;: 5" in html
    assert all(re.search(rf"<td>{name}</td>", html) for name in ("s0", "s2", "s3", "s4", "s5"))
    assert not re.search("<td>s6</td>", html)  # unlabelled
    assert "no: 3, yes: 3, unlabelled: 1" in html


def test_what_the_cohort_says_is_escaped(html: str) -> None:
    assert "<script" not in html
    assert "&lt;script&gt;x" in html


def test_top_patches_stand_beside_each_map(html: str) -> None:
    maps, patches = html.count('class="map"'), html.count('alt="Patch ')
    assert 1 <= maps <= 8
    assert patches == 6 * maps


def test_the_template_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.resources import files

    monkeypatch.chdir(tmp_path)
    assert files("pipeline.results").joinpath("report.html").is_file()


def test_it_says_what_one_half_means_and_what_probabilities_are_worth(html: str) -> None:
    assert "Sensitivity" in html
    assert re.search(r"Specificity</td><td>\d of 3, \d\.\d{3} \(", html)
    assert "Brier score 0." in html
    assert "At a threshold of one half" in html
    assert "At a threshold of 0.450, chosen on validation slides" in html
    assert html.count('<table class="confusion">') == 2
    for name in ("Average precision", "Balanced accuracy", "Cohen&#39;s kappa", "Log loss", "Calibration error"):
        assert re.search(rf"<td>{name}</td><td>-?\d\.\d{{3}}</td>", html), name
    assert "By stratum" not in html  # this cohort has no such column
