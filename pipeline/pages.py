"""HTML pages that need nothing else: no scripts, no fonts, no network. All extend `page.html`, which is their look."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined


def render_page(template: str, filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """The page of a template, named from this package on (`results/report.html`); what is not markup is escaped."""
    environment = Environment(
        loader=FunctionLoader(_source),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(template).render(**values)


def _source(name: str) -> str:
    return files("pipeline").joinpath(name).read_text("utf-8")
