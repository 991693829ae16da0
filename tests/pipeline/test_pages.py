from __future__ import annotations

from pathlib import Path

import pytest
from jinja2 import UndefinedError

import pipeline
from pipeline.pages import render_page

PAGES = sorted(
    str(path.relative_to(Path(pipeline.__file__).parent))
    for path in Path(pipeline.__file__).parent.glob("*/*.html")
    if "{% extends" in path.read_text()
)


@pytest.fixture
def template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    base = Path(pipeline.__file__).parent / "page.html"
    (tmp_path / "page.html").write_text(base.read_text())
    (tmp_path / "a.html").write_text(
        '{% extends "page.html" %}{% block title %}{{ name }}{% endblock %}'
        "{% block style %}b { color: red; }{% endblock %}{% block main %}<p>{{ name | twice }}</p>{% endblock %}"
    )
    monkeypatch.setattr("pipeline.pages.files", lambda _: tmp_path)
    return "a.html"


def test_a_page_has_its_own_style_after_the_common_one_and_escapes_what_is_not_markup(template: str) -> None:
    page = render_page(template, {"twice": lambda text: 2 * text}, name="<b>")
    assert "<title>&lt;b&gt;</title>" in page
    assert "<p>&lt;b&gt;&lt;b&gt;</p>" in page
    assert page.index("--accent") < page.index("b { color: red; }") < page.index("</style>")


def test_what_a_template_asks_for_must_be_given(template: str) -> None:
    with pytest.raises(UndefinedError, match="'name' is undefined"):
        render_page(template, {"twice": str})


def test_every_page_has_the_common_look() -> None:
    assert len(PAGES) == 6
    for page in PAGES:
        assert "<style" not in (Path(pipeline.__file__).parent / page).read_text()
