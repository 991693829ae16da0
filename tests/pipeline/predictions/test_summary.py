from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.config.data import TaskConfig
from pipeline.predictions.output import Failure
from pipeline.predictions.summary import write_summary


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
