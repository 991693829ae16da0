from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli.main import app
from pipeline.config.compose import load_config
from pipeline.ingest.tiler import store_slide
from tests.pipeline.small import write_cohort


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """A cohort of three plain images, two of them tiled."""
    cohort = write_cohort(tmp_path, ["no", "yes", "no"])
    lines = [f"{slide.slide_id},{Path(slide.uri).name}" for slide in cohort.slides]
    (tmp_path / "cohort.csv").write_text("\n".join(["slide_id,uri", *lines]) + "\n")
    given = ["tiling=image", "tiling.patch_px=32", f"cohort.uri={tmp_path}/cohort.csv", f"storage.root={tmp_path}/root"]
    config = load_config("default", given)
    for slide in cohort.slides[:2]:
        assert store_slide(slide, config.tiling, str(config.storage.patches)).key
    return given


def said(*arguments: str, code: int = 0) -> dict[str, object]:
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == code, result.output
    answer: dict[str, object] = json.loads(result.stdout)
    return answer


def test_qc_writes_page_table_and_outlines_of_what_is_tiled(arguments: list[str], tmp_path: Path) -> None:
    outputs = said("qc", *arguments)["outputs"]
    assert isinstance(outputs, dict)
    page = Path(outputs["quality"])
    assert page.parent == tmp_path / "root" / "reports" / "default-quality"
    assert "1 not tiled yet" in page.read_text()
    assert Path(outputs["quality_table"]).read_text().count('"committed"') == 2
    assert len(list((page.parent / "tissue").iterdir())) == 2


def test_export_names_every_file(arguments: list[str], tmp_path: Path) -> None:
    answer = said("export", "--format", "clam", "--out", str(tmp_path / "h5"), *arguments)
    assert answer["files"] == {name: str(tmp_path / "h5" / f"{name}.h5") for name in ("s0", "s1")}
    wrong = said("export", "--format", "trident", "--out", str(tmp_path / "h5"), *arguments, code=1)
    assert "export for CLAM" in str(wrong["message"])
