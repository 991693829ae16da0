from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pipeline.config.release import GateConfig
from pipeline.errors import StageError
from pipeline.gate.evidence import canonical, parse
from tests.pipeline.gate.made import evidence, finding


def test_evidence_comes_back_from_its_json_and_keeps_its_digest() -> None:
    found = evidence(GateConfig(approval=True), drift=(finding("eosin", 0.001, 0.7),))
    again = parse(json.loads(json.dumps(found.plain())))
    assert again == found
    assert again.digest == found.digest
    alone = replace(found, champion=None, drift=None)
    assert parse(alone.plain()) == alone
    assert replace(found, seed=1).digest != found.digest


def test_evidence_of_another_release_says_so() -> None:
    plain = evidence(GateConfig(approval=True), software={"ips-pipeline": "0.0.9"}).plain()
    del plain["taken_back"]
    with pytest.raises(StageError, match=r"other fields \(taken_back\) .* with the one that took it: .*0\.0\.9"):
        parse(plain)


def test_equal_values_have_equal_bytes() -> None:
    assert canonical({"b": (1, 2.5), "a": float("nan")}) == b'{"a":null,"b":[1,2.5]}'
    assert canonical({"a": float("inf")}) == canonical({"a": None})
