from __future__ import annotations

import inspect

from pipeline.storage.cloud import Cloud
from pipeline.storage.objects import Objects
from pipeline.storage.s3 import Amazon


def test_every_client_has_every_method_of_the_seam() -> None:
    methods = {name: method for name, method in vars(Cloud).items() if inspect.isfunction(method) and name[0] != "_"}
    assert len(methods) == 14
    for client in (Amazon, Objects):
        for name, method in methods.items():
            found = inspect.signature(getattr(client, name)).parameters
            assert list(found) == list(inspect.signature(method).parameters), (client, name)
