from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.data import TaskConfig
from pipeline.predictions.output import Failure
from pipeline.predictions.summary import write_summary
from tests.pipeline.view.browser import chromium


def test_a_page_of_its_own_that_runs_nothing_it_was_given(tmp_path: Path) -> None:
    tasks = [TaskConfig(name="t", column="label", classes=("no", "yes"))]
    good: dict[str, Any] = {
        "folder": "slides/a b#1", "values": {"t_no": 0.25, "t_yes": 0.75}, "n_patches": 1234, "selected": 64,
        "attention_in_selected": 0.831, "sentences": ["83% of <b>it</b>."],
    }  # fmt: skip
    asked = [("<script>1</script>", "a.svs"), ("b", "s3://bucket/b.svs")]
    write_summary(
        str(tmp_path), "models:/m/3", asked, [good, Failure("missing", "not <there>")], [{"t": "yes"}, {}], tasks
    )
    page = (tmp_path / "summary.html").read_text()
    assert "1 of 2 slides predicted" in page
    assert "<script" not in page
    assert "&lt;script&gt;1" in page
    assert "83% of &lt;b&gt;it" in page
    assert 'href="slides/a%20b%231/overlay.png"' in page
    assert "0.750" in page
    assert "1,234" in page
    assert "t, as labelled" in page
    assert "not &lt;there&gt;" in page
    assert "http" not in page.replace("s3://", "")


@pytest.mark.slow
def test_headings_of_two_tasks_with_labels_and_intervals_are_broken_between_words_alone(tmp_path: Path) -> None:
    tasks = [
        TaskConfig(name="lesion", column="lesion", classes=("no", "yes")),
        TaskConfig(name="burden", column="burden", kind="regression"),
    ]
    columns = [column for task in tasks for column in task.output_columns]
    good: dict[str, Any] = {
        "folder": "slides/a", "values": dict.fromkeys(columns, 0.25), "n_patches": 1234, "selected": 64,
        "intervals": dict.fromkeys(columns, (0.1, 0.345)), "tested": 40, "attention_in_selected": 0.831,
        "sentences": ["What the outputs are without the patches that have the most attention. " * 4],
    }  # fmt: skip
    labels = {"lesion": "yes", "burden": "0.42"}
    write_summary(str(tmp_path), "models:/m/3", [("a", "/slides/of/a/hospital/a.svs")], [good], [labels], tasks)
    with chromium() as browser:
        browser.set_window_size(1500, 900)
        browser.get((tmp_path / "summary.html").as_uri())
        lines = browser.execute_script(  # of 20 px, and 16 px around them
            "return Array.from(document.querySelectorAll('th'), (th) => [th.textContent, (th.clientHeight - 16) / 20])"
        )
    assert "burden, as labelled" in [name for name, _ in lines]
    assert all(many < 3.5 for _, many in lines), lines
