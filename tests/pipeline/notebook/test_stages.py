from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import StageError
from pipeline.notebook.stages import Run, Stage, run
from tests.pipeline.small import small_config
from tests.pipeline.workflow.images import image_config, write_images


def made(folder: Path, **stages: dict[str, str]) -> Run:
    """A run with these outputs."""
    done = {name: Stage(name, "done", 1.25, {"slides": 2.0}, outputs) for name, outputs in stages.items()}
    return Run(small_config(), "done", done, "r", None)


def test_tables_and_pages_are_those_of_the_outputs(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("slide_id,p\na,0.25\n")
    (tmp_path / "r.html").write_text("<h1>report</h1>")
    found = made(tmp_path, evaluate={"predictions": f"{tmp_path}/p.csv", "report": f"{tmp_path}/r.html"})
    assert found.predictions.to_pylist() == [{"slide_id": "a", "p": 0.25}]
    assert found.report.html == "<h1>report</h1>"
    assert "<td>evaluate</td><td>done</td><td>1.25</td><td>slides 2</td>" in found._repr_html_()


def test_what_a_run_did_not_make_is_said(tmp_path: Path) -> None:
    found = made(tmp_path, tile={})
    with pytest.raises(StageError, match=r'no predictions: its last stage is tile.*run\(config, "evaluate"\)'):
        found.predictions  # noqa: B018
    assert found.metrics == {"slides": 2.0}


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_says_what_it_did_and_opens_its_store(ray_session: None, tmp_path: Path) -> None:
    write_images(tmp_path, {"a": "p", "b": "q"})
    config = image_config(tmp_path)
    first, again = run(config, "tile"), run(config, "tile")
    assert (first.outcome, again.outcome, again.run_id, again.model) == ("done", "nothing to do", None, None)
    assert len(first.store) == 2
    assert sorted(again.slides["slide_id"].to_pylist()) == ["a", "b"]
    assert "<" in again.quality.html
