from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow.compute as pc
import pytest
from typer.testing import CliRunner

from pipeline.cli.main import app
from pipeline.config.compose import load_config
from pipeline.config.recipe import Config
from pipeline.errors import StageError
from pipeline.storage.lease import held
from pipeline.store.shelf import Shelf
from pipeline.store.verify import verify_store
from pipeline.workflow.leftovers import find_leftovers, remove
from pipeline.workflow.run import run
from pipeline.workflow.stage import Record
from tests.pipeline.tiled import contents
from tests.pipeline.workflow.images import image_config, write_images


def _aged(folder: Path, days: float) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (0, path.stat().st_mtime - days * 86_400))


def _names(config: Config, days: float = 7) -> dict[str, str]:
    root = config.storage.root + "/"
    return {one.uri.removeprefix(root): one.why for one in find_leftovers(config, days)}


@pytest.mark.ray
def test_what_nothing_names_goes_and_what_is_named_stays(
    ray_session: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path, {"a": "p", "b": "q", "bad": "r"})
    config = image_config(tmp_path, "tiling.max_bad_slides=1")
    root = Path(config.storage.root)
    run(config, "tile")
    store = Path(str(config.storage.patches)) / config.tiling.fingerprint()
    whole = contents(root)
    assert _names(config, 0) == {}

    write_images(tmp_path, {"a": "p", "bad": "r", "c": "s"})
    run(config, "tile")
    record = max(root.glob("stages/tile-*.json"), key=lambda path: path.stat().st_mtime)
    keys = Record(**json.loads(record.read_text())).keys
    record.unlink()  # a run that never ended: c is stored, and nothing names it
    (root / "train" / "small-0123" / "step-00000010").mkdir(parents=True)
    (root / "train" / "small-0123" / "step-00000010" / "state.pt").write_bytes(bytes(1000))
    (store / "packs" / ".77.tmp").write_bytes(b"half")
    (store / "packs" / f"pack-{'0' * 64}.arrow").write_bytes(b"half of a group")
    pack = Path(Shelf(str(store)).view.slides.filter(pc.field("key") == keys["c"])["pack"][0].as_py()).name
    unfinished = store / "unfinished" / "k"
    unfinished.mkdir(parents=True)
    for name in ("part-00000-x.parquet", "damaged"):
        (unfinished / name).write_bytes(b"1")
    assert _names(config) == {}  # all of it is young
    _aged(root, 8)

    found = _names(config)
    spec = f"patches/{config.tiling.fingerprint()}"
    new = record.name.removesuffix(".json")
    assert found == {
        f"ledger/{new}": "no finished stage names it",
        f"reports/default-{new}": "no finished stage names it",
        "train/small-0123": "no finished stage names it",
        f"{spec}/packs/{pack}": "1 of its 1 slides are of no cohort that was tiled here",
        f"{spec}/packs/pack-{'0' * 64}.arrow": "the catalogue does not know it: its writer was killed",
        f"{spec}/packs/.77.tmp": "its writer was killed",
        f"{spec}/unfinished/k/part-00000-x.parquet": "a part of a slide whose tiling was not gone on with",
    }
    with held(str(root / "stages" / "train-1.lease"), "train"), pytest.raises(StageError, match="is at work on it"):
        find_leftovers(config, 7)

    (kept,) = root.glob("stages/tile-*.json")
    ledger = Path(Record(**json.loads(kept.read_text())).outputs["ledger_slides"])
    whole_ledger = ledger.read_bytes()
    for damage in (ledger.unlink, lambda: ledger.write_bytes(whole_ledger[:-9])):
        damage()
        caplog.clear()
        assert _names(config) == {name: why for name, why in found.items() if not name.endswith(pack)}
        assert f"{kept}: its slides are not known (" in caplog.text
        assert f"{ledger}: " in caplog.text
        assert "run `tile` with its config, which writes the ledger anew" in caplog.text
    ledger.write_bytes(whole_ledger)

    command = ["gc", f"storage.root={root}", f"cohort.uri={tmp_path / 'cohort.csv'}", "tiling=image"]
    told = CliRunner().invoke(app, [*command, "tiling.patch_px=64"])
    assert told.exit_code == 0, told.output
    assert "7 leftovers" in told.stdout
    assert "--delete removes them" in told.stdout
    assert _names(config) == found
    remove(find_leftovers(config, 7))
    assert _names(config, 0) == {}
    left = contents(root)
    assert {name for name in whole if "mlflow" not in name and ".lease" not in name} <= set(left)
    verified = verify_store(str(config.storage.patches), 2, lambda *_: None)
    assert verified.damage + verified.leftovers == []  # no source says c is stored


def test_stores_shared_with_others_are_not_looked_at(tmp_path: Path) -> None:
    places = [f"storage.root={tmp_path / 'r'}", f"storage.patches={tmp_path / 'p'}"]
    config = load_config("default", ["cohort.uri=c.csv", *places])
    (tmp_path / "p" / "spec" / "key").mkdir(parents=True)
    (tmp_path / "p" / "spec" / "key" / "slide.json").write_text("{}")
    assert find_leftovers(config, 0) == []
