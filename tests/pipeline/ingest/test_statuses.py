"""Statuses in columns are those that were put in, in the cohort's order."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.ingest.statuses import as_columns, in_order, numbered
from pipeline.storage.files import SourceVersion
from pipeline.store.patches import SlideStatus

TEXT = st.text(st.characters(), max_size=3)
STATUSES = st.lists(
    st.builds(
        SlideStatus,
        TEXT,
        TEXT,
        st.none() | TEXT,
        st.sampled_from(["committed", "quarantined"]),
        st.none() | TEXT,
        st.integers(0, 9),
        st.integers(0, 9),
        st.none() | TEXT,
        st.none() | TEXT,
        st.none() | st.tuples(st.floats(0, 9), st.floats(0, 9)),
        st.none() | st.builds(SourceVersion, st.integers(0, 9), st.none() | TEXT, st.none() | st.floats(0, 9)),
    ),
    max_size=6,
)


@settings(deadline=None)
@given(STATUSES, st.data())
def test_parts_come_back_in_order(statuses: list[SlideStatus], data: st.DataObject) -> None:
    assert as_columns(statuses) == statuses
    assert [status.version for status in as_columns(statuses)] == [status.version for status in statuses]
    assert as_columns(held := as_columns(statuses)) is held
    shuffled = data.draw(st.permutations(list(enumerate(statuses))))
    cut = data.draw(st.integers(0, len(shuffled)))
    assert in_order(numbered(shuffled[:cut]), numbered(shuffled[cut:])) == statuses
    assert in_order(held) == statuses
