"""obstore against s3fs on one S3 server (`rclone serve s3`), in pairs: `python -m tests.bench.objects`.

Ranges are told and not timed: rclone answers them with status 200 instead of 206, which obstore refuses and s3fs reads.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import obstore
from obstore.store import S3Store

from pipeline.storage import files
from pipeline.storage.s3 import PART_BYTES
from tests.s3 import serve_s3

PAIRS = 5


def compare(s3fs: Callable[[], object], other: Callable[[], object]) -> dict[str, float]:
    """Medians of wall and CPU time, ms, and of the ratio of pairs, whose order alternates."""
    assert s3fs() == other()
    taken: dict[str, list[tuple[float, float]]] = {"s3fs": [], "obstore": []}
    for pair in range(PAIRS):
        order = [("s3fs", s3fs), ("obstore", other)]
        for name, work in order[:: 1 if pair % 2 else -1]:
            cpu, wall = time.process_time(), time.perf_counter()
            work()
            taken[name].append((1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)))
    pairs = zip(taken["s3fs"], taken["obstore"], strict=True)
    found = {"ratio": statistics.median(mine[0] / its[0] for mine, its in pairs)}
    for name, times in taken.items():
        found[f"{name}_ms"], found[f"{name}_cpu_ms"] = (
            statistics.median(column) for column in zip(*times, strict=True)
        )
    return found


def main() -> None:
    """Measure, print a table and JSON."""
    with tempfile.TemporaryDirectory() as folder, serve_s3(Path(folder) / "s3") as server:
        os.environ.update(server.env)
        root, data = server.bucket("bench"), os.urandom(64 << 20)
        keys = {"access_key_id": server.env["AWS_ACCESS_KEY_ID"], "region": server.env["AWS_REGION"]}
        keys |= {"secret_access_key": server.env["AWS_SECRET_ACCESS_KEY"], "endpoint": server.endpoint}
        store = S3Store("bench", config=keys, client_options={"allow_http": True})
        files.write_bytes(f"{root}/large", data)
        for number in range(400):
            (server.folder / "bench" / "small").mkdir(exist_ok=True)
            (server.folder / "bench" / "small" / f"{number:03d}").write_bytes(data[number * 1000 :][:1000])
        names = [f"small/{number:03d}" for number in range(100)]

        def put() -> None:
            obstore.put(store, "put", data[: 32 << 20], chunk_size=PART_BYTES, max_concurrency=4)

        found = {
            "64 MiB read": compare(
                lambda: files.read_bytes(f"{root}/large"), lambda: bytes(obstore.get(store, "large").bytes())
            ),
            "32 MiB written": compare(lambda: files.write_bytes(f"{root}/put", data[: 32 << 20]), put),
            "100 of 1 kB, one by one": compare(
                lambda: [files.read_bytes(f"{root}/{name}") for name in names],
                lambda: [bytes(obstore.get(store, name).bytes()) for name in names],
            ),
            "400 listed": compare(
                lambda: len(files.list_names(f"{root}/small")),
                lambda: len(obstore.list_with_delimiter(store, "small/")["objects"]),
            ),
        }
        try:
            obstore.get_range(store, "large", start=5, length=7)
            ranges = "answered"
        except obstore.exceptions.GenericError as error:
            ranges = str(error).splitlines()[0]
    for name, row in found.items():
        print(f"{name:24} " + "  ".join(f"{key} {value:7.1f}" for key, value in row.items()))
    print(f"ranges by obstore: {ranges}")
    print(json.dumps({"cases": found, "ranges": ranges}))


if __name__ == "__main__":
    main()
