from __future__ import annotations

from html.parser import HTMLParser

from pipeline.notebook.html import Page, table_html


class Attributes(HTMLParser):
    """What the frame of a page holds."""

    document: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "iframe":
            self.document = dict(attrs)["srcdoc"]


def test_a_page_stands_in_a_frame_whatever_it_holds() -> None:
    html = "<style>p{color:\"red\"}</style><p>5 < 6 & 'x'</p>"
    parser = Attributes()
    parser.feed(Page("a/<b>.html", html)._repr_html_())
    assert parser.document == html
    assert "<b>" not in Page("a/<b>.html", html)._repr_html_()


def test_a_table_shows_numbers_in_short_and_text_as_text() -> None:
    html = table_html(("a", "b<"), [(0.123456, None), ("<i>", 7)])
    assert html == (
        "<table><tr><th>a</th><th>b&lt;</th></tr><tr><td>0.1235</td><td></td></tr>"
        "<tr><td>&lt;i&gt;</td><td>7</td></tr></table>"
    )
