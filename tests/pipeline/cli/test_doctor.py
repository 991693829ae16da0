from __future__ import annotations

from pathlib import Path

from pipeline.cli.doctor import examine


def test_each_finding_says_how_to_mend(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    checks = {c.name: c for c in examine("default", [f"storage.root={tmp_path / 'file'}"], None)}
    assert not checks["storage"].ok
    assert str(tmp_path / "file") in checks["storage"].found
    assert all(check.remedy for check in checks.values() if not check.ok)
    assert checks["openslide"].ok


def test_a_bad_config_is_a_finding(tmp_path: Path) -> None:
    checks = {c.name: c for c in examine("default", ["train.lr=0"], None)}
    assert not checks["config"].ok
    assert "train.lr" in checks["config"].found
    assert "storage" not in checks
