"""S3's listings of many objects, answered from names that are in order: rclone walks a whole bucket for each page.

It walks, and reads every file for its digest: of 20,000 objects a page takes longer than clients wait. What is said is
what it says (`tests/test_listings.py`), so figures behind it are of a server that lists as S3 does.
"""

from __future__ import annotations

import bisect
import hashlib
import os
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

PAGE = 1000  # names, S3's limit


class Listings:
    """Answers for the server that serves `folder`, whose folders are its buckets.

    What is written past the server after a bucket was listed first is not noticed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names: dict[str, list[str]] = {}
        self._written: set[tuple[str, str]] = set()
        self._digests: dict[tuple[int, int, int], str] = {}
        self._lock = threading.Lock()

    def answer(self, method: str, path: str) -> bytes | None:
        """The answer to a listing; None for any other request, of which it notes what is written."""
        asked = urlsplit(path)
        bucket, _, key = unquote(asked.path).lstrip("/").partition("/")
        query = {name: values[0] for name, values in parse_qs(asked.query, keep_blank_values=True).items()}
        if method == "GET" and query.get("list-type") == "2":
            with self._lock:
                return self._page(bucket, query).encode()
        if method in ("PUT", "POST", "DELETE"):
            assert key, f"{method} {path}: deleting many at once is not followed"
            self._written.add((bucket, key))
        return None

    def _page(self, bucket: str, query: dict[str, str]) -> str:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        most = min(PAGE, int(query.get("max-keys", PAGE)))
        after = query.get("continuation-token") or query.get("start-after", "")
        objects, folders, last = list[str](), list[str](), ""
        rest = self._after(bucket, prefix, delimiter, after)
        for name in rest:
            if len(objects) + len(folders) == most:
                break
            is_folder = bool(delimiter) and delimiter in name[len(prefix) :]
            (folders if is_folder else objects).append(name)
            last = name
        else:
            return _xml(bucket, query, [self._entry(bucket, name) for name in objects], folders, None)
        return _xml(bucket, query, [self._entry(bucket, name) for name in objects], folders, last)

    def _after(self, bucket: str, prefix: str, delimiter: str, after: str) -> Iterator[str]:
        """Names from there on, in order; of those that share a folder the folder, once."""
        names = self._listed(bucket)
        place = max(bisect.bisect_left(names, prefix), bisect.bisect_right(names, after))
        while place < len(names) and names[place].startswith(prefix):
            end = names[place].find(delimiter, len(prefix)) if delimiter else -1
            if end < 0:
                yield names[place]
                place += 1
            else:
                folder = names[place][: end + 1]
                if folder > after:
                    yield folder
                place = bisect.bisect_left(names, folder[:-1] + chr(ord(folder[-1]) + 1), place)

    def _listed(self, bucket: str) -> list[str]:
        """All names of a bucket in S3's order, that of code points."""
        top = str(self._folder / bucket)
        if bucket not in self._names:
            found = (os.path.join(at, name) for at, _, names in os.walk(top) for name in names)  # noqa: PTH118
            self._names[bucket] = sorted(path[len(top) + 1 :] for path in found)
        names = self._names[bucket]
        for _, key in (one for one in self._written if one[0] == bucket):
            place = bisect.bisect_left(names, key)
            is_known = place < len(names) and names[place] == key
            is_there = os.path.isfile(os.path.join(top, key))  # noqa: PTH113, PTH118
            if is_there and not is_known:
                names.insert(place, key)
            elif is_known and not is_there:
                del names[place]
        return names

    def _entry(self, bucket: str, key: str) -> tuple[str, int, str, str]:
        """Key, bytes, digest and time of an object."""
        path = self._folder / bucket / key
        found = path.stat()
        state = found.st_ino, found.st_mtime_ns, found.st_size
        if state not in self._digests:
            self._digests[state] = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        time = datetime.fromtimestamp(found.st_mtime_ns // 10**9, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        return key, found.st_size, self._digests[state], f"{time}.{found.st_mtime_ns // 10**6 % 1000:03d}Z"


def _xml(
    bucket: str, query: dict[str, str], objects: list[tuple[str, int, str, str]], folders: list[str], last: str | None
) -> str:
    """A page; the next one begins after `last`, None where there is none."""
    is_quoted = query.get("encoding-type") == "url"

    def text(name: str) -> str:
        return quote(name, safe="/") if is_quoted else escape(name)

    parts = ['<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">']
    parts.append(f"<Name>{escape(bucket)}</Name><Prefix>{text(query.get('prefix', ''))}</Prefix>")
    parts.append(f"<MaxKeys>{query.get('max-keys', PAGE)}</MaxKeys><KeyCount>{len(objects) + len(folders)}</KeyCount>")
    parts.append(f"<IsTruncated>{str(last is not None).lower()}</IsTruncated>")
    parts.append("<EncodingType>url</EncodingType>" if is_quoted else "")
    parts.append("" if last is None else f"<NextContinuationToken>{escape(last)}</NextContinuationToken>")
    for key, size, digest, time in objects:
        parts.append(f"<Contents><Key>{text(key)}</Key><LastModified>{time}</LastModified>")
        parts.append(f"<ETag>&quot;{digest}&quot;</ETag><Size>{size}</Size><StorageClass>STANDARD</StorageClass>")
        parts.append("</Contents>")
    parts += [f"<CommonPrefixes><Prefix>{text(folder)}</Prefix></CommonPrefixes>" for folder in folders]
    return "".join([*parts, "</ListBucketResult>"])
