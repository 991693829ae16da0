"""A batch as one HTML page that needs nothing else but the files beside it: no scripts, no fonts, no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from pipeline.config.data import TaskConfig
from pipeline.pages import render_page
from pipeline.predictions.output import CONTACT, OVERLAY, TOP, Failure, Outcome, ends_of
from pipeline.storage.files import join, write_bytes

NAME = "summary.html"
MEANT = {
    "calibrated": "calibrated: of slides with such an output, the share that has the class lies there, by the test "
    "of {patients} patients. It tells of the output and is no confidence interval around it: that may lie outside.",
    "95%": "95%: of 100 new slides like those of the test, of {patients} patients, the label lies there for 95. It "
    "is as wide for every slide.",
}
"""Kind of an interval -> what it means, for people."""


def write_summary(
    out: str,
    source: str,
    asked: Sequence[tuple[str, str]],
    outcomes: Sequence[Outcome],
    labels: Sequence[Mapping[str, str | None]],
    tasks: Sequence[TaskConfig],
    patients: Sequence[str | None] | None = None,
) -> str:
    """Its place. Arguments as `output.write_tables`; `source` is the model."""
    labelled = [task.name for task in tasks if any(one.get(task.name) is not None for one in labels)]
    whose = [None] * len(asked) if patients is None else patients
    rows = [
        {**_row(*one, tasks, labelled), "patient": patient}
        for one, patient in zip(zip(asked, outcomes, labels, strict=True), whose, strict=True)
    ]
    good = [row for row in rows if row["error"] is None]
    text = render_page(
        "predictions/summary.html",
        {},
        source=source,
        columns=[column for task in tasks for column in task.output_columns],
        labelled=labelled,
        good=good,
        bad=[row for row in rows if row["error"] is not None],
        meant=_meant(outcomes, tasks),
        patches=sum(row["n_patches"] for row in good),
    )
    place = join(out, NAME)
    write_bytes(place, text.encode(errors="backslashreplace"))
    return place


def _meant(outcomes: Sequence[Outcome], tasks: Sequence[TaskConfig]) -> list[str]:
    """What the intervals that there are mean."""
    good = [one for one in outcomes if not isinstance(one, Failure)]
    kinds = {
        ends[2]
        for one in good
        for task in tasks
        for column in task.output_columns
        if (ends := ends_of(one, task, column))
    }
    return [words.format(patients=good[0].get("tested")) for kind, words in MEANT.items() if kind in kinds]


def _row(
    asked: tuple[str, str],
    found: Outcome,
    labels: Mapping[str, str | None],
    tasks: Sequence[TaskConfig],
    labelled: Sequence[str],
) -> dict[str, Any]:
    slide_id, uri = asked
    if isinstance(found, Failure):
        return {"slide_id": slide_id, "uri": uri, "reason": found.reason, "error": found.message}
    folder = quote(found["folder"])
    return {
        "slide_id": slide_id,
        "uri": uri,
        "error": None,
        "values": [
            (found["values"][column], ends_of(found, task, column)) for task in tasks for column in task.output_columns
        ],
        "labels": [labels.get(name) for name in labelled],
        "n_patches": found["n_patches"],
        "share": found["attention_in_selected"],
        "selected": found["selected"],
        "sentences": found["sentences"],
        **{name: f"{folder}/{file}" for name, file in (("overlay", OVERLAY), ("contact", CONTACT), ("top", TOP))},
    }
