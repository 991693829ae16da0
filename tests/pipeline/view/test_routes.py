from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.view.routes import Route, parse

TAG = "0123456789abcdef"


@pytest.mark.parametrize(
    ("target", "route"),
    [
        ("/", Route("page")),
        ("/?token=x", Route("page")),
        ("/static/app.js", Route("static", name="app.js")),
        ("/slides", Route("slides")),
        (f"/{TAG}/3", Route("slide", tag=TAG, numbers=(3,))),
        (f"/{TAG}/3/tile/1/20/300", Route("tile", tag=TAG, numbers=(3, 1, 20, 300))),
        (f"/{TAG}/3/layer/2/1/20/300", Route("layer", tag=TAG, numbers=(3, 2, 1, 20, 300))),
    ],
)
def test_each_form(target: str, route: Route) -> None:
    assert parse(target) == route


@pytest.mark.parametrize(
    "target",
    ["", "//", "/static/../app.js", "/static/..", "/static/%2e%2e/x", "/static/a/b.js", "/etc/passwd", f"/{TAG}/-1",
     f"/{TAG}/3/tile/1/20", f"/{TAG}/3/tile/1/20/12345678", f"/{TAG}/٣", f"/{TAG}/3/", f"/{TAG.upper()}/3",
     "http://localhost/", "/slides?" + "x" * 600, "/slides\n", "*"],
)  # fmt: skip
def test_everything_else_is_nothing(target: str) -> None:
    assert parse(target) is None


@settings(deadline=None)
@given(st.one_of(st.text(max_size=700), st.from_regex(r"/[0-9a-f]{14,18}(/\w{0,9}){0,7}", fullmatch=True)))
def test_any_target_is_a_question_of_small_numbers_or_nothing(target: str) -> None:
    found = parse(target)
    if found is not None:
        assert all(0 <= number < 10**7 for number in found.numbers)
        assert re.fullmatch(r"[a-z]*(\.[a-z]+)*", found.name)
        assert target.partition("?")[0].count("..") == 0
