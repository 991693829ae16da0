"""Verification: a whole store has no findings, each kind of damage is found and told from what is harmless."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from pipeline.bags.streamed import plan_root
from pipeline.cli.main import app
from pipeline.cohort.table import CohortSlide
from pipeline.config.data import TilingConfig
from pipeline.errors import StorageError
from pipeline.ingest.tiler import begin_slide, store_slide
from pipeline.store import parts
from pipeline.store.features import FeatureStore
from pipeline.store.parts import parquet_bytes
from pipeline.store.patches import PatchStore, SlideStatus
from pipeline.store.repair import repair_store
from pipeline.store.verify import Report, verify_store
from tests.pipeline.tiled import RGB, SPEC, contents, part_file, row, small_tasks, tile_in_shares
from tests.s3 import serve_s3
from tests.synth import overwrite, tissue_rgb, write_pyramid, zero_tile

GO_ON = "the next run goes on with it if its slide is still in the cohort, and what it was; else delete the folder"


def store_slide_with(slide: CohortSlide, store: str, spec: TilingConfig) -> SlideStatus:
    return store_slide(slide, spec, store)


def verify(store: Path | str, threads: int = 2) -> Report:
    return verify_store(str(store), threads, lambda done, total: None)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two slides of several parts, and a quarantined one."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "MAX_PART_PATCHES", 9)
        for name, rgb in (("a", RGB), ("b", tissue_rgb(613, 487, seed=5))):
            path = write_pyramid(folder / f"{name}.tiff", rgb, levels=1)
            assert store_slide(row(path), SPEC, str(folder / "store")).status == "committed"
        (folder / "c.tiff").write_text("not a slide")
        assert store_slide(row(folder / "c.tiff"), SPEC, str(folder / "store")).status == "quarantined"
    return folder / "store"


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "store"))


@pytest.fixture
def slide(store: Path) -> Path:
    """The folder of one of its slides."""
    return min(path.parent for path in store.rglob("slide.json"))


def test_a_whole_store_has_no_findings(store: Path) -> None:
    before = contents(store)
    report = verify(store)
    assert (report.slides, report.damage, report.leftovers) == (2, [], [])
    listed = [entry for path in store.rglob("slide.json") for entry in json.loads(path.read_text())["parts"]]
    assert report.patches == sum(entry["patches"] for entry in listed)
    assert report.files > len(listed) > 4
    assert report.bytes == sum(len(data) for name, data in before.items() if "/catalogue/" not in name) - sum(
        path.stat().st_size for path in store.rglob("slide.json")
    )
    assert contents(store) == before
    (spec,) = store.iterdir()
    assert verify(spec) == Report(str(spec), 2, report.patches, report.files, report.bytes)


def flip(path: Path) -> None:
    at = path.stat().st_size // 2
    overwrite(path, at, bytes([path.read_bytes()[at] ^ 1]))


def swap_index(slide: Path) -> None:
    """An index that is what the commit says, of patches in another order."""
    table = pq.read_table(slide / "index.parquet")
    offsets = table.column("offset").to_pylist()
    offsets[0], offsets[1] = offsets[1], offsets[0]
    place = table.schema.get_field_index("offset")
    data = parquet_bytes(table.set_column(place, table.schema.field(place), pa.array(offsets)))
    commit(slide, data, table.num_rows)


def shorten_index(slide: Path) -> None:
    commit(slide, parquet_bytes(pq.read_table(slide / "index.parquet").slice(1)), 0)


def commit(slide: Path, index: bytes, patches: int) -> None:
    facts = json.loads((slide / "slide.json").read_text())
    (slide / "index.parquet").write_bytes(index)
    facts["index"] |= {"bytes": len(index), "sha256": hashlib.sha256(index).hexdigest()}
    (slide / "slide.json").write_text(json.dumps(facts))
    repair_store(str(slide.parent))  # the catalogue says the same


def another(slide: Path) -> None:
    facts = json.loads((slide / "slide.json").read_text())
    (slide / "slide.json").write_text(json.dumps({**facts, "mpp": 0.25}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "flipped bit": (lambda s: flip(part_file(s, 1)), "part-00001", "sha256 is not the committed one"),
    "cut short": (lambda s: part_file(s, 2).write_bytes(b"ARROW1"), "part-00002", "has 6 bytes"),
    "part gone": (lambda s: part_file(s).unlink(), "part-00000", "is gone"),
    "index gone": (lambda s: (s / "index.parquet").unlink(), "index.parquet", "is gone"),
    "index flipped": (lambda s: flip(s / "index.parquet"), "index.parquet", "sha256"),
    "index elsewhere": (swap_index, "part-00000", "index.parquet does not lead to its patches"),
    "index short": (shorten_index, "index.parquet", "does not number the"),
    "thumbnail": (lambda s: flip(s / "thumbnail.jpg"), "thumbnail.jpg", "sha256"),
    "commit cut": (lambda s: (s / "slide.json").write_text("{"), "slide.json", "not JSON"),
    "commit empty": (lambda s: (s / "slide.json").write_text("{}"), "slide.json", "'content'"),
    "another slide": (another, "", "is of another slide"),
    "commit gone": (lambda s: (s / "slide.json").unlink(), "slide.json", "says that the slide was committed"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found(kind: str, store: Path, slide: Path) -> None:
    spoil, name, words = DAMAGE[kind]
    spoil(slide)
    (finding,) = verify(store).damage
    folder, _, file = finding.uri.rpartition("/")
    assert (folder, file.startswith(name)) == (str(slide), True) if name else finding.uri == str(slide)
    assert words in finding.what
    assert "run the tile stage" in finding.remedy


def test_a_file_of_the_catalogue_that_cannot_be_read_is_damage(store: Path) -> None:
    (spec,) = store.iterdir()
    cut = min(spec.glob("catalogue/*"))
    cut.write_bytes(cut.read_bytes()[:-9])
    (finding,) = verify(store).damage
    assert finding.uri == str(cut)
    assert "pipeline store repair" in finding.remedy


def test_a_catalogue_that_says_otherwise_than_the_slides_is_damage(store: Path, slide: Path) -> None:
    facts = json.loads((slide / "slide.json").read_text())
    (slide / "slide.json").write_text(json.dumps({**facts, "vendor": "another"}))
    (finding,) = verify(store).damage
    assert (finding.uri, "pipeline store repair" in finding.remedy) == (str(slide), True)
    repair_store(str(store))
    assert verify(store).damage == []


def test_leftovers_are_told_and_harmless(store: Path, slide: Path) -> None:
    (slide / ".0123.tmp").write_bytes(b"half")
    (slide / "notes.txt").touch()
    gone = slide.parent / ("f" * 32)
    gone.mkdir()
    (gone / "part-00000.arrow").touch()
    for key in (slide.name, "f" * 32):
        (slide.parent / "unfinished" / key).mkdir(parents=True)
        (slide.parent / "unfinished" / key / "part-00000.parquet").touch()
    report = verify(store)
    assert report.damage == []
    assert {(Path(f.uri).name, f.what, f.remedy) for f in report.leftovers} == {
        (".0123.tmp", "its writer was killed or is still writing", "delete it when no run is active"),
        ("notes.txt", "a file that the commit does not name", "delete it"),
        ("f" * 32, "1 files of a slide that is not committed", GO_ON),
        ("f" * 32, "records of 1 parts", GO_ON),
        (slide.name, "records of 1 parts of a committed slide", "delete the folder"),
    }


@pytest.mark.usefixtures("small_parts")
def test_a_slide_that_lost_its_commit_is_tiled_again(store: Path, original: Path) -> None:
    before = contents(store)
    for path in list(store.rglob("slide.json")):
        path.unlink()
    assert [Path(finding.uri).name for finding in verify(store).damage] == ["slide.json"] * 2
    assert verify(store).leftovers == []
    for name in "ab":
        assert store_slide(row(original.parent / f"{name}.tiff"), SPEC, str(store)).status == "committed"
    assert contents(store) == before
    assert verify(store).damage == []


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tasks(monkeypatch.setattr)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("tile", [store_slide_with, tile_in_shares])
def test_what_a_slide_that_was_given_up_leaves(
    tmp_path: Path, tile: Callable[[CohortSlide, str, TilingConfig], SlideStatus]
) -> None:
    path = write_pyramid(tmp_path / "a.tiff", RGB, levels=1)
    zero_tile(path, 0, 4)  # in the middle: parts before it are written
    spec = SPEC.model_copy(update={"tissue": "none", "max_bad_tiles": 0.01})
    assert str(tile(row(path), str(tmp_path / "store"), spec).reason).startswith("bad-tiles")
    report = verify(tmp_path / "store")
    assert (report.damage, report.slides) == ([], 0)
    assert report.leftovers
    assert {finding.remedy for finding in report.leftovers} == {"delete the folder when no run is active"}
    assert all("of a slide that was given up: bad-tiles: " in finding.what for finding in report.leftovers)
    for finding in report.leftovers:
        shutil.rmtree(finding.uri)
    assert verify(tmp_path / "store").leftovers == []


def test_a_slide_that_is_gone_is_a_leftover_of_its_source(store: Path, slide: Path) -> None:
    shutil.rmtree(slide)
    (finding,) = verify(store).leftovers
    assert (finding.uri, finding.what) == (str(slide), "the catalogue says that it is there")


def test_what_is_no_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"by default <storage.root>/patches"):
        verify(tmp_path)


def test_the_command_ends_with_3_where_something_is_damaged(store: Path, slide: Path) -> None:
    run = CliRunner()
    fine = run.invoke(app, ["verify", str(store)])
    assert (fine.exit_code, "2 slides" in fine.stdout, "all whole" in fine.stdout) == (0, True, True)
    flip(part_file(slide, 1))
    broken = run.invoke(app, ["verify", str(store)])
    assert (broken.exit_code, "1 damaged" in broken.stdout) == (3, True)
    told = run.invoke(app, ["verify", str(store), "--json", "--threads", "1"])
    said = json.loads(told.stdout)
    assert (told.exit_code, said["whole"], said["damage"][0]["uri"]) == (3, False, str(part_file(slide, 1)))
    assert run.invoke(app, ["verify", str(slide)]).exit_code == 1


def test_a_store_on_s3(store: Path, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_s3(tmp_path) as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        assert verify("s3://store", threads=8).damage == []
        flip(part_file(slide, 1))
        assert [finding.uri.rpartition("/")[2] for finding in verify("s3://store").damage] == [part_file(slide, 1).name]


def test_features_and_plans_are_verified_too(store: Path, slide: Path, tmp_path: Path) -> None:
    patches = PatchStore(str(store), SPEC.fingerprint())
    stored = patches.slide(slide.name)
    vectors = np.arange(stored.n_patches * 4, dtype=np.float32).reshape(-1, 4)
    store_of_features = FeatureStore(str(tmp_path / "features"), SPEC.fingerprint(), "e" * 16)
    features = store_of_features.write(stored, [vectors], {})
    store_of_features.append(store_of_features.rows(stored.key))
    source = store.parent / "a.tiff"
    write_pyramid(source, RGB, levels=1)
    planned = begin_slide(row(source), SPEC, plan_root(str(store)), whole=True, pixels=False)
    report, plans = verify(tmp_path / "features"), verify(store)
    assert (report.slides, report.patches, report.damage, report.leftovers) == (1, stored.n_patches, [], [])
    assert (plans.slides, plans.damage, plans.leftovers) == (3, [], [])
    assert isinstance(planned, SlideStatus)
    (part,) = Path(features.uri).glob("part-00000-*.arrow")
    flip(part)
    flip(store / "plans" / SPEC.fingerprint() / str(planned.key) / "index.parquet")
    assert [Path(f.uri).name for f in verify(tmp_path / "features").damage] == [part.name]
    assert [Path(f.uri).name for f in verify(store).damage] == ["index.parquet"]
