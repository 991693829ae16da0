"""How a retraining ended, for whoever waits for it: a file to look at, and one request to a server.

`<root>/release/latest.json` holds what `retrain --json` prints. The request is a POST of the same bytes, with a header
`X-Signature-256: sha256=HEX`, the HMAC-SHA256 of the body by the secret in IPS_NOTIFY_SECRET, where that is set; the
secret itself is never sent. What cannot be delivered is kept, and tried again by the next retraining.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import json
import logging
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from pipeline.storage.files import delete, join, read_if_there, write_bytes

log = logging.getLogger(__name__)

SECRET = "IPS_NOTIFY_SECRET"
PAUSES_S = (1.0, 4.0, 15.0)
"""Between one try and the next."""
DEADLINE_S = 60.0
"""For all tries together, pauses included."""
_TIMEOUT_S = 10.0
"""Of one try, without a byte from the server."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib follows a 301 or 302 with a GET that has no body: nobody would be told, and it would look delivered."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def tell(root: str, url: str | None, result: Mapping[str, Any]) -> None:
    """Write `latest.json`, and tell the server where there is one; a server that is away is no failure."""
    body = (json.dumps(result, sort_keys=True, indent=1) + "\n").encode()
    if url is not None:
        write_bytes(_unsent(root), body)
    write_bytes(join(root, "release", "latest.json"), body)
    send_unsent(root, url)


def send_unsent(root: str, url: str | None) -> None:
    """Deliver what an earlier retraining could not, or was killed before it did."""
    body = None if url is None else read_if_there(_unsent(root))
    if url is None or body is None:
        return
    failure = _post(url, body)
    if failure is None:
        delete(_unsent(root))
    else:
        log.warning("notify.url: %s did not take the result (%s); the next retraining tries again", url, failure)


def _unsent(root: str) -> str:
    return join(root, "release", "unsent.json")


def _post(url: str, body: bytes) -> str | None:
    """None where the server took it; else why not."""
    headers = {"Content-Type": "application/json", "User-Agent": "ips-pipeline"}
    if secret := os.environ.get(SECRET):
        headers["X-Signature-256"] = f"sha256={hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()}"
    given_up = time.monotonic() + DEADLINE_S
    failure, final = "", False
    for pause in (0.0, *PAUSES_S):
        left = given_up - time.monotonic() - pause
        if final or left <= 0:
            break
        time.sleep(pause)
        failure, final = _within(left, lambda: _tried(url, body, headers))
        if not failure:
            return None
    return failure


def _within(seconds: float, work: Callable[[], tuple[str, bool]]) -> tuple[str, bool]:
    """What `_tried` says, or that it has not ended: urllib's timeout begins anew with every byte."""
    found: list[tuple[str, bool]] = []
    thread = threading.Thread(target=lambda: found.append(work()), name="notify", daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else (f"it had not answered {DEADLINE_S:g} s after it was first asked", True)


def _tried(url: str, body: bytes, headers: Mapping[str, str]) -> tuple[str, bool]:
    """Why the server did not take it, empty where it did; and whether it never will."""
    try:
        request = urllib.request.Request(url, body, dict(headers), method="POST")
        with _OPENER.open(request, timeout=_TIMEOUT_S):
            return "", True
    except urllib.error.HTTPError as error:
        moved = error.headers.get("Location")
        error.close()
        failure = f"HTTP {error.code}" + (f", it is at {moved} now" if moved else "")
        return failure, error.code < 500 and error.code not in (408, 429)
    except (OSError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__, False
    except ValueError as error:  # of urllib
        return f"it is no URL: {error}", True
