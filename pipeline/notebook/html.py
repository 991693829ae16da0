"""What objects look like in a notebook: tables and whole pages as HTML that needs no other file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

FRAME_PX = 640  # height of a page


@dataclass(frozen=True)
class Page:
    """A page that the pipeline wrote, as a frame of its own in the notebook: its style stays its own."""

    uri: str
    html: str

    def _repr_html_(self) -> str:
        frame = f'width="100%" height="{FRAME_PX}" style="border:1px solid #ccc"'
        return f'<p>{escape(self.uri)}</p><iframe srcdoc="{escape(self.html)}" {frame}></iframe>'


def table_html(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; numbers in short, nothing where there is none."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    lines = ("".join(f"<td>{escape(_short(cell))}</td>" for cell in row) for row in rows)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _short(cell: object) -> str:
    return "" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)
