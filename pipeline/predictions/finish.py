"""What slides share, once all are there: the overlay on the one colour scale, and the scale in each slide's facts."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from pipeline.inference.heatmap import Heatmap, overlay_box, overlay_png
from pipeline.predictions.maps import read_maps
from pipeline.predictions.output import ATTENTION, OVERLAY, THUMBNAIL, commit, read_facts
from pipeline.predictions.sentences import outputs_line
from pipeline.storage.files import join, read_bytes, write_bytes


@dataclass(frozen=True)
class Finishing:
    """How folders are finished. Picklable."""

    colours: Mapping[str, Mapping[str, float]]
    columns: Sequence[str]
    """Of the outputs, in the model's order, which JSON does not keep."""

    def worker(self) -> Callable[[str], None]:
        """What finishes a slide's folder."""
        return self.finish

    def finish(self, folder: str) -> None:
        """Draw the overlay, unless it is there in these colours."""
        facts = read_facts(folder)
        assert facts is not None  # it was committed before
        if facts["colours"] == self.colours:
            return
        table = read_maps(read_bytes(join(folder, ATTENTION)), ["x", "y", "attention"])
        thumbnail = np.asarray(Image.open(io.BytesIO(read_bytes(join(folder, THUMBNAIL)))).convert("RGB"))
        x, y, attention = (table[name].to_numpy() for name in ("x", "y", "attention"))
        dimensions = facts["dimensions"]
        scale = max(dimensions) / max(thumbnail.shape[:2])
        among = facts["patient"]["n_patches"] if "patient" in facts else None
        slide = Heatmap(thumbnail, scale, x, y, facts["patch"], attention, facts["mpp"], tuple(dimensions), among)
        top = self.colours["score"]["high"]
        picture = overlay_png(slide, top, caption=caption(facts, self.columns), clipped=True)
        write_bytes(join(folder, OVERLAY), picture)
        box = overlay_box(thumbnail.shape[:2])
        commit(folder, {**facts, "colours": dict(self.colours), "overlay": box._asdict()})


def caption(facts: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    """What stands below an overlay, with the outputs in this order."""
    score = facts["maps"]["score"]
    values = outputs_line(facts["values"], columns)
    return [facts["slide_id"], values, f"{facts['model']['source']}; {score['version']}", facts["sentences"][0]]
