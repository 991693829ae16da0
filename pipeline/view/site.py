"""What is answered: lists, one slide's facts, tiles of the slide and of its layers. Knows nothing of HTTP."""

from __future__ import annotations

import json
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np

from pipeline.slides.identity import slide_files
from pipeline.slides.open import open_uri
from pipeline.slides.reader import SlideReader, square_mpp
from pipeline.storage.staging import Staging
from pipeline.view.colours import Scale, coloured, shaded
from pipeline.view.pyramid import Step, plain_steps, steps
from pipeline.view.rasters import Floats, Mask, painted, shade
from pipeline.view.readers import Readers
from pipeline.view.routes import Route
from pipeline.view.shown import ATTENTION, READ, TISSUE, Batch, Patches
from pipeline.view.tiles import PNG, Picture, tile

TOP = 200  # patches that one can jump through
FRAMES = 512  # selected patches that are framed
KEPT = 6  # slides whose patches are held: 41 bytes a patch and more for further maps
DIFFERENCE = "difference"
_LEAST = 1 / 8  # of uniform attention: two models that both hardly look differ by nothing
_APART = Scale(
    "signed",
    3.0,
    "how many times more attention: vermilion the first model, blue the second",
    "the same for all slides; attention below an eighth of uniform counts as an eighth",
    times=True,
)


Value = TypeVar("Value")


@dataclass(frozen=True)
class Layer:
    """One that can be laid over slides."""

    name: str
    model: int | None
    """Number of the batch whose numbers it shows; None: of no model, or of both."""
    scale: Scale | None
    """None: it darkens."""


@dataclass(frozen=True)
class _Opened:
    """What is known of a slide once it was opened."""

    steps: tuple[Step, ...]
    layers: tuple[Step, ...]
    dimensions: tuple[int, int]
    mpp: float | None
    bounds: Sequence[int]


class _Kept(Generic[Value]):
    """The values of the last few keys; one that is not there is read once, however many ask."""

    def __init__(self) -> None:
        self._values: OrderedDict[tuple[int, int], Value] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[int, int], read: Callable[[], Value]) -> Value:
        with self._lock:
            if key not in self._values:
                self._values[key] = read()
                if len(self._values) > KEPT:
                    self._values.popitem(last=False)
            self._values.move_to_end(key)
            return self._values[key]


class Site:
    """Everything that can be asked for.

    Args:
        batches: what is looked at, and maybe what it is compared with: a slide of the second is shown with that of the
            first that lies at the same place.
        staging: where copies of slides go that cannot be read by range from a bucket.
    """

    def __init__(self, batches: Sequence[Batch], staging: Staging) -> None:
        self.tag = secrets.token_hex(8)
        self._batches = batches
        first = batches[0]
        places = [{slide.uri: number for number, slide in enumerate(batch.slides)} for batch in batches]
        self._numbers = [[place.get(slide.uri) for place in places] for slide in first.slides]
        for number, found in enumerate(self._numbers):
            found[0] = number  # a slide may be listed twice
        self.layers = tuple(_layers(batches))
        self._staging = staging
        self.readers = Readers([partial(self._open_slide, number) for number in range(len(first.slides))])
        self._opened: dict[int, _Opened] = {}
        self._patches: _Kept[Patches | None] = _Kept()
        self._masks: _Kept[Mask | None] = _Kept()

    def close(self) -> None:
        """Close the slides."""
        self.readers.close()

    def picture(self, route: Route) -> Picture:
        """A tile of a slide or of a layer.

        Raises:
            IndexError: there is no such slide, layer, step or tile.
            PipelineError: the slide or its patches cannot be read.
        """
        if route.kind == "tile":
            slide, step, column, row = route.numbers
            with self.readers.borrow(self._known(slide)) as reader:
                return tile(reader, _one("step", self._look(slide, reader).steps, step), column, row)
        slide, layer, step, column, row = route.numbers
        opened = self._of(slide)
        laid, at = _one("layer", self.layers, layer), _one("step", opened.layers, step)
        return Picture(self._painted(slide, laid, opened, at, column, row), PNG)

    def listed(self) -> bytes:
        """The slides and layers, as JSON."""
        first = self._batches[0]
        slides = [
            {
                "id": slide.slide_id,
                "label": slide.label,
                "told": [asdict(told) for told in slide.told],
                "reason": slide.reason,
                "facts": slide.facts,
                "other": None if (other := self._other(number)) is None else [asdict(told) for told in other.told],
            }
            for number, slide in enumerate(first.slides)
        ]
        layers = [
            {"name": one.name, "model": one.model, "legend": None if one.scale is None else one.scale.legend()}
            for one in self.layers
        ]
        models = [batch.name for batch in self._batches]
        return _json({"tag": self.tag, "models": models, "layers": layers, "slides": slides})

    def detailed(self, slide: int) -> bytes:
        """One slide's size, steps, layers and top patches, as JSON; errors as `picture`."""
        opened = self._of(slide)
        described = [_described(steps) for steps in (opened.steps, opened.layers)]
        found = [self._patches_of(slide, model) for model in range(len(self._batches))]
        return _json(
            {
                "width": opened.dimensions[0],
                "height": opened.dimensions[1],
                "mpp": opened.mpp,
                "bounds": list(opened.bounds),
                "steps": described[0],
                "layerSteps": described[1],
                "layers": [number for number, layer in enumerate(self.layers) if self._has(slide, layer)],
                "models": [None if patches is None else _patches_told(patches) for patches in found],
                "sentences": list(self._batches[0].sentences(slide)),
            }
        )

    def _known(self, slide: int) -> int:
        _one("slide", self._numbers, slide)
        return slide

    def _other(self, slide: int) -> Any:
        numbers = self._numbers[slide]
        return self._batches[1].slides[numbers[1]] if len(numbers) > 1 and numbers[1] is not None else None

    def _open_slide(self, slide: int) -> Any:
        uri = self._batches[0].slides[slide].uri
        return open_uri(uri, partial(slide_files, uri), self._staging, series=self._batches[0].series(slide))

    def _of(self, slide: int) -> _Opened:
        if (known := self._opened.get(self._known(slide))) is not None:
            return known
        with self.readers.borrow(slide) as reader:
            return self._look(slide, reader)

    def _look(self, slide: int, reader: SlideReader) -> _Opened:
        """What is known of an open slide: two threads that look at once see the same."""
        if (known := self._opened.get(slide)) is not None:
            return known
        tiles = [reader.native_tiles(number) for number in range(len(reader.levels))]
        mpp = self._batches[0].slides[slide].mpp or (None if reader.mpp is None else square_mpp(reader.mpp))
        made = steps(reader.levels, tiles)
        found = _Opened(made, plain_steps(*reader.dimensions), reader.dimensions, mpp, reader.bounds)
        return self._opened.setdefault(slide, found)

    def _patches_of(self, slide: int, model: int) -> Patches | None:
        number = self._numbers[slide][model]
        if number is None:
            return None
        return self._patches.get((model, number), partial(self._batches[model].patches, number))

    def _mask_of(self, slide: int) -> Mask | None:
        return self._masks.get((0, slide), partial(self._batches[0].tissue, slide))

    def _has(self, slide: int, layer: Layer) -> bool:
        if layer.name == TISSUE:
            return self._mask_of(slide) is not None
        models = range(len(self._batches)) if layer.model is None and layer.name == DIFFERENCE else [layer.model or 0]
        found = [self._patches_of(slide, model) for model in models]
        name = ATTENTION if layer.name == DIFFERENCE else layer.name
        return all(patches is not None and (layer.scale is None or name in patches.values) for patches in found)

    def _painted(self, slide: int, layer: Layer, opened: _Opened, step: Step, column: int, row: int) -> bytes:
        if not self._has(slide, layer):
            raise IndexError(f"slide {slide} has no layer {layer.name}")
        if layer.name == TISSUE:
            mask = self._mask_of(slide)
            assert mask is not None
            return shaded(~shade(mask, opened.dimensions, step, column, row))
        if layer.scale is None:
            return shaded(~self._values(slide, 0, None, step, column, row)[1])
        if layer.name == DIFFERENCE:
            (one, in_one), (two, in_two) = (
                self._values(slide, model, ATTENTION, step, column, row) for model in range(2)
            )
            apart = np.log2(np.maximum(one, _LEAST)) - np.log2(np.maximum(two, _LEAST))
            return coloured(layer.scale, apart, in_one & in_two)
        return coloured(layer.scale, *self._values(slide, layer.model or 0, layer.name, step, column, row))

    def _values(
        self, slide: int, model: int, name: str | None, step: Step, column: int, row: int
    ) -> tuple[Floats, Mask]:
        patches = self._patches_of(slide, model)
        assert patches is not None
        values = np.ones(len(patches.squares)) if name is None else patches.values[name]
        return painted(patches.squares, values, step, column, row)


def _one(what: str, there: Sequence[Value], number: int) -> Value:
    """That of a number from 0; IndexError by its name where it is not there."""
    if number >= len(there):
        raise IndexError(f"no {what} {number} of {len(there)}")
    return there[number]


def _layers(batches: Sequence[Batch]) -> list[Layer]:
    found = [Layer(TISSUE, None, None), Layer(READ, None, None)]
    found += [Layer(name, model, scale) for model, batch in enumerate(batches) for name, scale in batch.scales.items()]
    if len(batches) > 1:
        found.append(Layer(DIFFERENCE, None, _APART))
    return found


def _described(made: Sequence[Step]) -> list[dict[str, Any]]:
    return [
        {
            "downsample": one.downsample,
            "columns": one.columns,
            "rows": one.rows,
            "tileWidth": one.tile_width,
            "tileHeight": one.tile_height,
        }
        for one in made
    ]


def _patches_told(patches: Patches) -> dict[str, Any]:
    """Counts, the top patches with their numbers, and where the selected ones are."""
    top = patches.top(TOP)
    squares, rows = patches.squares, np.flatnonzero(patches.selected)[:FRAMES]
    return {
        "count": len(squares),
        "selected": int(patches.selected.sum()),
        "mass": patches.mass,
        "frames": np.stack([squares.x[rows], squares.y[rows], squares.size[rows]], axis=1).tolist(),
        "top": [
            {
                "x": float(squares.x[row]),
                "y": float(squares.y[row]),
                "size": float(squares.size[row]),
                "selected": bool(patches.selected[row]),
                "values": {name: float(values[row]) for name, values in patches.values.items()},
            }
            for row in top.tolist()
        ],
    }


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
