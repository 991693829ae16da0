"""What `predict` wrote, to look at: the only module that knows its files, of which predictions/README.md tells."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from pipeline.errors import DamagedError, StorageError
from pipeline.storage import files
from pipeline.view.colours import Scale
from pipeline.view.rasters import Floats, Mask, Squares
from pipeline.view.shown import ATTENTION, Batch, Patches, ShownSlide, Told

PREDICTIONS, ATTENTIONS, SLIDE, TISSUE = "predictions.parquet", "attention.parquet", "slide.json", "tissue.geojson"
MASK_PX = 2048
_SCORE, _EFFECT, _HEAD, _LABEL = "score", "effect_", "attention_", "_label"
_FACTS = {"width", "height", "mpp", "attention_in_selected", "n_patches", "n_bad_tiles"}
_LOW, _HIGH, _INTERVAL = "_low", "_high", b"ips.interval"
_TESTED = b"ips.tested"
_REMEDY = "run predict again, which makes what is not whole"
_UNIFORM = "\N{MULTIPLICATION SIGN} uniform attention"


def is_output(uri: str) -> bool:
    """Whether a folder is one that `predict` wrote."""
    return files.exists(files.join(uri, PREDICTIONS))


class Output(Batch):
    """The slides of a prediction, in the order of its table."""

    def __init__(self, out: str) -> None:
        """Raises StorageError where the folder is not whole."""
        self.uri = files.absolute(out)
        rows = _table(files.join(self.uri, PREDICTIONS))
        missing = sorted({"slide_id", "uri", "folder"} - set(rows.column_names))
        if missing:
            raise DamagedError(f"{self.uri}/{PREDICTIONS}: it has no column {', '.join(missing)}; {_REMEDY}")
        listed = rows.to_pylist()
        floats = [field.name for field in rows.schema if pa.types.is_floating(field.type) and field.name not in _FACTS]
        marked = {field.name for field in rows.schema if _INTERVAL in (field.metadata or {})}
        ends = marked or _ends(floats)
        numbers = [name for name in floats if name not in ends]
        self._folders = [row["folder"] for row in listed]
        first = next((folder for folder in self._folders if folder is not None), None)
        self._said = {} if first is None else _json(files.join(self.uri, first, SLIDE))
        self.name = str(self._said.get("model", {}).get("source", self.uri))
        kinds = {field.name: (field.metadata or {}).get(_INTERVAL, b"interval").decode() for field in rows.schema}
        self._tested = {f.name: int(found) for f in rows.schema if (found := (f.metadata or {}).get(_TESTED))}
        self.slides = [self._slide(row, numbers, ends, kinds) for row in listed]
        self.scales = _scales(self._said, numbers)

    def _slide(
        self, row: Mapping[str, Any], numbers: list[str], ends: set[str], kinds: Mapping[str, str]
    ) -> ShownSlide:
        labels = [str(value) for name, value in row.items() if name.endswith(_LABEL) and value is not None]
        spread = {name: row[name] for name in ends}
        told = tuple(
            Told(
                name,
                row[name],
                spread.get(name + _LOW),
                spread.get(name + _HIGH),
                kinds.get(name + _LOW, ""),
                self._tested.get(name + _LOW),
            )
            for name in numbers
            if row[name] is not None and math.isfinite(row[name]) and not name.endswith(_LABEL)
        )
        return ShownSlide(
            row["slide_id"],
            row["uri"],
            mpp=row.get("mpp"),
            label=", ".join(labels) or None,
            told=told,
            reason=row.get("error") or row.get("reason"),
        )

    def series(self, number: int) -> int | None:
        """See `Batch.series`."""
        found = self._slide_said(number).get("series")
        return None if found is None else int(found)

    def sentences(self, number: int) -> Sequence[str]:
        """See `Batch.sentences`."""
        return [str(sentence) for sentence in self._slide_said(number).get("sentences", ())]

    def _slide_said(self, number: int) -> dict[str, Any]:
        """What its `slide.json` says; nothing where it has none."""
        folder = self._folders[number]
        return {} if folder is None else _json(files.join(self.uri, folder, SLIDE))

    def patches(self, number: int) -> Patches | None:
        """See `Batch.patches`."""
        if (folder := self._folders[number]) is None:
            return None
        uri = files.join(self.uri, folder, ATTENTIONS)
        table = _table(uri)
        wanted = {"x", "y", "size", "attention", "selected"}
        if missing := sorted(wanted - set(table.column_names)):
            raise DamagedError(f"{uri}: it has no column {', '.join(missing)}; {_REMEDY}")
        among = self._slide_said(number).get("patient", {}).get("n_patches", len(table))
        values = {}
        for layer in self.scales:
            column = _SCORE if layer == ATTENTION and _SCORE in table.column_names else layer
            if column in table.column_names:
                of_shares = layer.startswith(_HEAD) or column == ATTENTION
                values[layer] = _floats(table, column) * (among if of_shares else 1)
        squares = Squares(*(_floats(table, name) for name in ("x", "y", "size")))
        for name, numbers in {"x": squares.x, "y": squares.y, "size": squares.size, **values}.items():
            if not np.isfinite(numbers).all():  # one alone would spoil every mean
                raise DamagedError(f"{uri}: {name} has values that are no numbers; {_REMEDY}")
        return Patches(squares, values, np.asarray(table["selected"].to_numpy(), np.bool_))

    def tissue(self, number: int) -> Mask | None:
        """See `Batch.tissue`."""
        if (folder := self._folders[number]) is None:
            return None
        uri = files.join(self.uri, folder, TISSUE)
        if (data := files.read_if_there(uri)) is None:
            return None
        said = self._slide_said(number)
        width, height = said["dimensions"]
        return _drawn(files.parsed_json(uri, data), (width, height), said.get("origin", (0, 0)))


def _ends(columns: Sequence[str]) -> set[str]:
    """Those that are the ends of another's interval, where the file does not say so: as before it did.

    Classes too may be called low and high.
    """
    there = set(columns)
    pairs = [(name + _LOW, name + _HIGH) for name in columns]
    return {end for pair in pairs if there.issuperset(pair) for end in pair}


def _drawn(outlines: Mapping[str, Any], dimensions: tuple[int, int], origin: tuple[float, float]) -> Mask:
    """Polygons of GeoJSON as a mask of the whole slide, `MASK_PX` along its longer edge at most.

    Args:
        outlines: a FeatureCollection of Polygons and MultiPolygons, level-0 px from `origin`.
        dimensions: width and height of the slide, level-0 px.
        origin: x and y of the slide that they count from.
    """
    scale = max(1.0, max(dimensions) / MASK_PX)
    image = Image.new("1", (math.ceil(dimensions[0] / scale), math.ceil(dimensions[1] / scale)))
    draw = ImageDraw.Draw(image)
    for feature in outlines["features"]:
        shape = feature["geometry"]
        polygons = [shape["coordinates"]] if shape["type"] == "Polygon" else shape["coordinates"]
        for outer, *holes in polygons:
            for ring, inside in ((outer, 1), *((hole, 0) for hole in holes)):
                corners = [((x + origin[0]) / scale - 0.5, (y + origin[1]) / scale - 0.5) for x, y in ring]
                draw.polygon(corners, fill=inside)
    return np.asarray(image)


def _scales(said: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Scale]:
    """By layer, from what `slide.json` says of its maps and their colours, which all slides share.

    Heads first, by their numbers, then effects in the order of the outputs' `columns`: JSON has both by the alphabet.
    """
    maps, colours = said.get("maps") or {}, said.get("colours") or {}
    found = (
        {ATTENTION: Scale("rising", _end(colours, _SCORE, 10.0), _UNIFORM, _whence(colours, _SCORE))} if said else {}
    )
    places = {_EFFECT + column: place for place, column in enumerate(columns)}
    for name in sorted(maps, key=lambda name: (places.get(name, -1), _parts(name))):
        if name.startswith(_EFFECT):
            unit = f"what the output gains by the patch: {maps[name].get('unit', 'number')}"
            found[name] = Scale("signed", _end(colours, "effect", 1.0), unit, _whence(colours, "effect"))
        elif name.startswith(_HEAD):
            found[name] = Scale("rising", _end(colours, _SCORE, 10.0), _UNIFORM, _whence(colours, _SCORE))
    return found


def _parts(name: str) -> list[str | int]:
    """By which names with numbers in them are sorted: text and numbers in turn."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", name)]


def _end(colours: Mapping[str, Any], which: str, otherwise: float) -> float:
    """Where a scale ends: its farther end from zero; over 1 of attention, for it begins there."""
    ends = colours.get(which, {})
    end = max((abs(float(ends[name])) for name in ("low", "high") if ends.get(name) is not None), default=otherwise)
    usable = math.isfinite(end) and end > 0
    return max(2.0, end) if which == _SCORE and usable else end if usable else otherwise


def _whence(colours: Mapping[str, Any], which: str) -> str:
    quantile = colours.get(which, {}).get("quantile")
    if quantile is None:
        return "the same for all slides"
    return f"ends at the {100 * float(quantile):g}% quantile of the patches of all slides"


def _floats(table: pa.Table, name: str) -> Floats:
    return np.asarray(table[name].to_numpy(), np.float64)


def _table(uri: str) -> pa.Table:
    data = files.read_bytes(uri)
    try:
        return pq.read_table(pa.BufferReader(data))
    except pa.ArrowException as error:
        raise DamagedError(f"{uri}: no Parquet file, or cut short ({error}); {_REMEDY}") from error


def _json(uri: str) -> dict[str, Any]:
    found = files.read_json(uri)
    if not isinstance(found, dict):
        raise StorageError(f"{uri}: it holds no JSON object; {_REMEDY}")
    return found
