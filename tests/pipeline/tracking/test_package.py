from __future__ import annotations

import ast
import hashlib
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.model.folder import MEMBERS, TISSUE_NETWORK
from pipeline.tracking import package
from pipeline.tracking.package import REQUIREMENTS, _signature, gather_artifacts, gather_members, requirements
from tests.pipeline.segmentation.networks import Toy, scripted, small_tiling
from tests.pipeline.small import small_config, write_model

ROOT = Path(package.__file__).parents[2]


def test_every_package_that_serving_imports_is_a_requirement() -> None:
    """Lazy imports too: tiles in JPEG 2000 need one of these alone."""
    optional = {"timm", "onnxruntime"}  # of models that need it
    # Of patch coordinates, of the embed stage, s3fs's own, and of gs:// and az://, which a host may have.
    others = {"h5py", "ray", "aiobotocore", "aiohttp", "botocore", "obstore"}
    wanted, seen, rest = set(), set(), {"pipeline.results.serving"}
    while rest:
        seen.add(name := rest.pop())
        path = ROOT.joinpath(*name.split("."))
        source = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
        for imported in _imports(source):
            root = imported.partition(".")[0]
            if root in ("pipeline", "ips"):
                rest |= {imported} - seen
            elif root not in sys.stdlib_module_names:
                wanted.add(root)
    packages = packages_distributions()
    missing = {
        root for root in wanted - optional - others if not {p.lower() for p in packages[root]} & set(REQUIREMENTS)
    }
    assert missing == set()
    assert "imagecodecs" in wanted


def _imports(source: Path) -> set[str]:
    """Modules that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            inside = {name for name in names if ROOT.joinpath(*name.split(".")).with_suffix(".py").is_file()}
            found |= inside or {node.module}
    return found


def test_a_network_for_tissue_that_is_onnx_needs_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "installed", lambda name: "1.20" if name == "onnxruntime" else "2.0+cpu")
    monkeypatch.setattr("pipeline.segmentation.network.find_spec", lambda name: name)
    path = tmp_path / "network"
    path.write_bytes(b"\x08\x07")  # as an ONNX model begins
    known = {"uri": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "mpp": 8.0}
    network = {**known, "classes": ["glass", "tissue"], "tissue": ["tissue"]}
    config = small_config(tiling={"mpp": 0.5, "tissue": "model", "tissue_model": network})
    assert "onnxruntime==1.20" in requirements(config)
    assert not any("onnxruntime" in one for one in requirements(small_config()))


def test_a_network_for_tissue_is_packed_once_and_only_the_one_that_was_meant(tmp_path: Path) -> None:
    network = scripted(Toy(), tmp_path / "toy.pt")
    config, meant = small_config(tiling=small_tiling(network)), network.read_bytes()
    (folder := tmp_path / "model").mkdir()
    (scratch := tmp_path / "scratch").mkdir()
    write_model(folder, config)
    assert Path(gather_artifacts(folder, config, scratch)["tissue_network"]).read_bytes() == meant
    members = Path(gather_members([folder, folder], config, scratch)[MEMBERS])
    assert [path.relative_to(members) for path in members.rglob(TISSUE_NETWORK)] == [Path(TISSUE_NETWORK)]
    assert (members / TISSUE_NETWORK).read_bytes() == meant
    assert "tissue_network" not in gather_artifacts(folder, small_config(), scratch)
    scripted(Toy(limit=30.0), network)
    with pytest.raises(
        ConfigError, match=r"tiling\.tissue_model\.sha256: .*toy\.pt has [0-9a-f]{64}: it is another file"
    ):
        gather_artifacts(folder, config, scratch)


@pytest.mark.parametrize("section", ["model", "embed"])
def test_a_network_of_timm_needs_timm(section: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "installed", lambda name: "1.0.7" if name == "timm" else "2.0+cpu")
    named = {"encoder": {"name": "timm:vit_tiny"}}
    other = {"model": {"encoder": {"name": "features", "features": 8}}, "embed": named, "train": {"augment": False}}
    config = small_config(**({"model": named} if section == "model" else other))
    assert "timm==1.0.7" in requirements(config)
    assert not any(line.startswith("timm") for line in requirements(small_config()))


def test_a_model_of_patients_is_told_which_rows_are_one_s() -> None:
    for bag, columns in (("slide", ["uri", "mpp", "series"]), ("patient", ["uri", "mpp", "series", "patient"])):
        signature = _signature(small_config(cohort={"uri": "c.csv", "bag": bag}))
        assert signature.inputs.input_names() == columns
        assert signature.inputs.required_input_names() == ["uri"]
    specimens = _signature(small_config(cohort={"uri": "c.csv", "bag": "patient", "specimen": "block"}))
    assert specimens.inputs.input_names() == ["uri", "mpp", "series", "patient", "specimen"]
