from __future__ import annotations

import re
from pathlib import Path

from pipeline.config.release import CalibrationRule, FloorRule, GateConfig, NoWorseRule, StrataRule
from pipeline.gate.decision import decide, digest
from pipeline.release.drift import find_drift
from pipeline.release.history import Act
from pipeline.release.pages import SHOWN, drift_page, gate_page
from tests.pipeline.gate.made import evidence, predictions, scores
from tests.pipeline.release.test_drift import TASK, sides

GATE = GateConfig(
    floors=(FloorRule(measure="auc", bound=0.8),),
    no_worse=NoWorseRule(margin=0.05, least=10),
    strata=(StrataRule(columns=("site",), measure="auc", bound=0.7),),
    calibration=CalibrationRule(most=0.4),
)


def test_the_gates_page_says_what_was_decided_and_why() -> None:
    found = evidence(GATE, candidate=predictions("2", scores(0.5, seed=4)))
    decision = decide(found)
    act = Act(
        "promote", "m", None, "1", None, None, "1", "d", ("first <model>",), "ada", None, 1, "2026-01-02T03:04:05"
    )
    diff = {"counts": {"added": 23, "relabelled": 1}, "slides": {"added": [f"new-{n}" for n in range(23)]}}
    page = gate_page("study", decision, digest(decision), diff, [act], ["candidate"])
    assert '<a href="candidate.html">candidate</a>' in page
    assert re.search(r'<span class="verdict reject">rejected</span>', page)
    assert "Compared with the champion, version 1, on the same slides." in page
    assert page.count('class="not-met">not met</td>') == sum(r["outcome"] == "not met" for r in decision["rules"])
    assert 'class="too-few">too few</td>' in page
    assert "new-19 and 3 more" in page
    assert "first &lt;model&gt;" in page
    assert page.index("Rejected because") < page.index("What next:")
    assert "<code>promote --approve 2 --force REASON</code>" in page
    rules = page[page.index("<h2>Rules") : page.index("<h2>Measures")]
    assert re.findall(r'class="(not-met|too-few|met)"', rules) == ["not-met"] * 2 + ["too-few"] + ["met"] * 6
    assert digest(decision)[:16] in page
    first = decide(evidence(GATE.model_copy(update={"first": "floors"}), champion=None, names_champion=None))
    assert "There was no champion.\nTest version 1: " in gate_page("study", first, digest(first), diff, [])
    assert "Every rule that could be judged is met." in gate_page("study", first, digest(first), diff, [])
    assert "This is the first decision." in gate_page("study", first, digest(first), diff, [])


def test_the_drift_page_shows_tests_distributions_and_the_most_unusual_slides_first(tmp_path: Path) -> None:
    made = sides(new=SHOWN + 7, old=90, eosin=14.0)
    findings = find_drift(made, [TASK], 0)
    page = drift_page("study", made, findings, {"alpha": 0.01, "effect": 0.5})
    assert re.search(r'<td class="not-met">eosin</td><td class="number">67</td><td class="number">90</td>', page)
    assert page.count('class="not-met"') == 1
    assert page.count("<svg") == 11
    assert page.count("data:image/jpeg;base64,") == 24
    assert "and 7 more" in page
    distances = [float(text) for text in re.findall(r'class="id">s\d+</td><td class="number">([\d.e+]+)</td>', page)]
    assert len(distances) == SHOWN
    assert distances == sorted(distances, reverse=True)
    assert "No rule holds a model by this" in drift_page("study", made, findings, None)
