"""The command: finds out what it is to show, serves it until it is told to end."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import quote

from pipeline.errors import ConfigError, StageError, StorageError
from pipeline.storage.staging import GIB, Staging
from pipeline.view.gate import TOKEN, Gate, gate, is_loopback
from pipeline.view.outputs import Output, is_output
from pipeline.view.server import ViewServer
from pipeline.view.shown import Batch
from pipeline.view.site import Site
from pipeline.view.stored import Stored

log = logging.getLogger(__name__)

CACHE = 50 * GIB  # for slides in a bucket that cannot be read by range


def opened(place: str) -> Batch:
    """What lies at a place: predictions, or a store.

    Raises:
        StorageError: neither.
    """
    if is_output(place):
        return Output(place)
    try:
        return Stored(place)
    except StorageError as error:
        raise StorageError(
            f"{place}: neither the --out of predict nor a patch store (storage.patches, by default "
            f"<storage.root>/patches): {error}"
        ) from error


def view(place: str, against: str | None, *, host: str, port: int, tell: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM, which is how it is meant to end.

    Args:
        place: folder or s3:// prefix that `predict` wrote, or a patch store.
        against: another one that `predict` wrote, to compare with.
        host: address to listen at.
        port: to listen at; 0: any free one.
        tell: called with the address to open, as soon as it answers.

    Raises:
        StorageError: there is nothing to look at.
        ConfigError: the token is none.
        StageError: the port cannot be had.
    """
    batches = [opened(place)]
    if against is not None:
        if not (is_output(place) and is_output(against)):
            raise ConfigError("--against", [f"{place} and {against}: only two folders of predict can be compared"])
        batches.append(opened(against))
    with serving(batches, gate(host, os.environ.get(TOKEN) or None), port) as server:
        tell(address(server))
        if not is_loopback(host):
            log.warning(
                "view: %s is open to the network, unencrypted; whoever has the address with its token may look; where "
                "%s is not known, put this machine's address there in its place",
                host,
                server.gate.name,
            )
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            log.info("view: ended")


@contextmanager
def serving(batches: Sequence[Batch], guard: Gate, port: int = 0) -> Iterator[ViewServer]:
    """A server that answers until the block ends."""
    site = Site(batches, Staging(budget=CACHE))
    try:
        server = ViewServer(site, guard, port)
    except (OSError, OverflowError) as error:
        raise StageError(f"view: cannot listen at {guard.host}, port {port}: {error}; give another --port") from error
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="view", daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        site.close()


def address(server: ViewServer) -> str:
    """What to open: with the token, where there is one."""
    host = server.gate.name
    shown = f"[{host}]" if ":" in host else host
    token = "" if server.gate.token is None else f"?token={quote(server.gate.token)}"
    return f"http://{shown}:{server.port}/{token}"
