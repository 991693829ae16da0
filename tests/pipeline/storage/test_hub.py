from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from pipeline.config.compose import load_config
from pipeline.errors import ConfigError, StorageError
from pipeline.storage.hub import hub_file


class _Hub(types.ModuleType):
    """What is used of huggingface_hub: one function, which needs a network that a test has not."""

    def __init__(self, cache: Path, refusal: str | None = None) -> None:
        super().__init__("huggingface_hub")
        self.cache, self.refusal, self.asked = cache, refusal, 0

    def hf_hub_download(self, repository: str, file: str, *, local_files_only: bool = False) -> str:
        path = self.cache / repository / file
        if not path.exists():
            if local_files_only:
                raise FileNotFoundError(path)
            self.asked += 1
            if self.refusal is not None:
                raise RuntimeError(self.refusal)
            path.parent.mkdir(parents=True)
            path.write_bytes(b"weights")
        return str(path)


def test_a_file_is_downloaded_once_and_only_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = _Hub(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    where = str(tmp_path / "MahmoodLab" / "UNI" / "pytorch_model.bin")
    assert [hub_file("hf:MahmoodLab/UNI/pytorch_model.bin", None) for _ in range(2)] == [where] * 2
    asked = ["cohort.uri=x", "embed.encoder.name=uni"]
    assert load_config("default", asked).embed.encoder.weights is None  # type: ignore[union-attr]
    assert load_config("default", [*asked, "embed.encoder.weights=hf:"]).embed.encoder.weights == where  # type: ignore[union-attr]
    assert hub.asked == 1


def test_what_cannot_be_had_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match="needs huggingface_hub, which is absent"):
        hub_file("hf:a/b/c.bin", None)
    for text in ("hf:", "hf:a", "hf:a/b"):
        with pytest.raises(ConfigError, match="names no file; write hf:OWNER/NAME/FILE"):
            hub_file(text, None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", _Hub(tmp_path, "403: gated"))
    with pytest.raises(
        StorageError, match=r"403: gated.*accept the terms at https://huggingface.co/a/b and set HF_TOKEN"
    ):
        hub_file("hf:a/b/c.bin", None)
