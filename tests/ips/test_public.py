"""The public face of `ips`: what it names is what it has, and nothing shadows it."""

from __future__ import annotations

import ips


def test_every_public_name_is_there_and_sorted() -> None:
    assert sorted(ips.__all__) == ips.__all__
    for name in ips.__all__:
        assert getattr(ips, name).__module__.startswith("ips."), name
    assert callable(ips.select)  # no module of the same name takes its place
