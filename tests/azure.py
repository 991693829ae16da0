"""A real server of Azure's blob storage (azurite, of npm) on a folder, for the tests."""

from __future__ import annotations

import base64
import hashlib
import hmac
import shutil
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path

import pytest

from tests.processes import free_port

ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="  # azurite's, for all
_VERSION = "2021-08-06"


@dataclass(frozen=True)
class AzureServer:
    """A running server."""

    endpoint: str

    def container(self, name: str) -> str:
        """Make a container and return its URI."""
        date = formatdate(usegmt=True)
        signed = "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:{_VERSION}\n"
        signed += f"/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
        digest = hmac.new(base64.b64decode(KEY), signed.encode(), hashlib.sha256).digest()
        headers = {"x-ms-date": date, "x-ms-version": _VERSION, "Content-Length": "0"}
        headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
        url = f"{self.endpoint}/{name}?restype=container"
        urllib.request.urlopen(urllib.request.Request(url, method="PUT", headers=headers)).close()
        return f"az://{name}"

    @property
    def env(self) -> dict[str, str]:
        """The environment of a client."""
        return {
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": KEY,
            "AZURE_STORAGE_ENDPOINT": self.endpoint,
        }


@contextmanager
def serve_azure(folder: Path) -> Iterator[AzureServer]:
    """Serve on a free loopback port until the block ends; skips the test where azurite is not installed."""
    program = shutil.which("azurite-blob")
    if program is None:
        pytest.skip("azurite is not installed; run: npm install azurite, and put node_modules/.bin on the PATH")
    port = free_port()
    command = [program, "--location", str(folder), "--blobHost", "127.0.0.1", "--blobPort", str(port)]
    with subprocess.Popen(
        [*command, "--skipApiVersionCheck"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        try:
            assert server.stdout is not None
            said = []
            for line in server.stdout:
                said.append(line)
                if "successfully listens" in line:
                    break
            else:
                raise RuntimeError("azurite ended before it listened:\n" + "".join(said))
            threading.Thread(target=server.stdout.read, daemon=True).start()
            yield AzureServer(f"http://127.0.0.1:{port}/{ACCOUNT}")
        finally:
            server.terminate()
            server.wait(timeout=10)
