"""Which places of a slide become patches, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.config.data import TilingConfig
from pipeline.errors import SlideError
from pipeline.slides.open import Overview
from pipeline.tiling.artefacts import artefact_mask
from pipeline.tiling.grid import Cells, Grid, LevelSize, placed_grid, plan_grid
from pipeline.tiling.guide import Guide
from pipeline.tiling.masks import Mask
from pipeline.tiling.tissue import Table, Tissue, closed, find_tissue, integral_image, tissue_fraction
from pipeline.units import Box

EXAMPLES = 6  # rejected patches that are kept to be looked at
_AT_ONCE = 16384  # cells whose shares are computed together: of 250,000, the boxes alone took 24 MB
_MOST = 0.5  # of the tissue: where it lies beyond the last patches, that is why there is none
_DECIMALS = 6  # of a share: its sums err by up to 1e-9, so a patch that is all tissue would miss `min_tissue: 1`
Shares = npt.NDArray[np.float64]
Segment = Callable[[Overview], Mask]
"""(h, w) where the tissue is, of an overview's px."""


class NothingFoundError(SlideError):
    """A slide has no patch."""

    coloured: Mask | None = None
    """(h, w) what of the overview was looked at: tissue, and artefacts too."""


@dataclass(frozen=True)
class Rejected:
    """A place that was looked at and left out."""

    column: int
    row: int
    """Of the grid."""
    reason: str
    """tissue (too little of it) or artefact."""
    tissue: float
    """Share of it that counts as tissue."""


@dataclass(frozen=True)
class Candidates:
    """The places of one slide."""

    grid: Grid
    cells: Cells
    """(n, 2) grid column and row of those that become patches."""
    mask: Mask
    """(h, w) where the tissue is, at the resolution of the overview; what could not be read counts as tissue."""
    rejects: Mapping[str, int]
    """Reason -> places: tissue (too little of it), artefact, and of imported ones outside and twice."""
    examples: tuple[Rejected, ...]
    """At most 6: artefacts, then those that missed the least."""
    beyond: float | None
    """Share of the tissue that lies beyond the last column and row; None for imported places."""
    tissue: Tissue | None
    """How it was looked for; None where it was not."""


def find_candidates(
    overview: Overview,
    levels: Sequence[LevelSize],
    spec: TilingConfig,
    mpp: float | None,
    guide: Guide,
    bounds: Box | None = None,
    segment: Segment | None = None,
) -> Candidates:
    """The places to cut: those of an imported file, else those of the grid with enough tissue.

    Args:
        overview: the slide at low resolution.
        levels: its pyramid.
        spec: how to tile.
        mpp: microns per level-0 px.
        guide: what was given beside the slide.
        bounds: where on the slide the scan lies (`SlideReader.bounds`); None: everywhere.
        segment: how the tissue is found with `spec.tissue: model`; not run where a guide says what is cut.

    Raises:
        SlideError: none is left ("no-tissue", "artefact", "too-little-tissue", "mask", "coords"), the guide does not
            fit ("mask", "coords"), or the grid does not ("too-coarse", "too-small").
    """
    if guide.coords is not None:
        placed, rejects = placed_grid(guide.coords, levels, spec, mpp)
        seen = _look(overview, placed, spec, guide, levels[0], bounds, None)  # a network might refuse the slide
        return Candidates(placed, placed.cells(), seen.mask, rejects, (), None, seen.tissue)
    grid = plan_grid(levels, spec, mpp)
    seen = _look(overview, grid, spec, guide, levels[0], bounds, segment)
    mask, cells = seen.mask, grid.cells()
    table = integral_image(mask)
    share, beyond = _shares(table, overview, grid, cells), _beyond(table, grid, levels[grid.level])
    del table  # 16 MB of 2048 x 2048 px
    kept = _enough(share, spec)
    with_artefacts = _shares(integral_image(seen.coloured), overview, grid, cells) if seen.artefact.any() else share
    spoilt = _enough(with_artefacts, spec) & ~kept
    rejects = {"tissue": int((~kept & ~spoilt).sum())}
    if spoilt.any():
        rejects["artefact"] = int(spoilt.sum())
    if not kept.any():
        nothing = _nothing(share, spec, guide, mask=mask, artefact=seen.artefact, spoilt=spoilt, beyond=beyond)
        nothing.coloured = seen.coloured
        raise nothing
    return Candidates(grid, cells[kept], mask, rejects, _examples(cells, share, kept, spoilt), beyond, seen.tissue)


@dataclass(frozen=True)
class _Seen:
    """What an overview shows; masks (h, w)."""

    mask: Mask
    """The tissue."""
    coloured: Mask
    """What may be tissue."""
    artefact: Mask
    """Which of that is none."""
    tissue: Tissue | None


def _look(
    overview: Overview,
    grid: Grid,
    spec: TilingConfig,
    guide: Guide,
    level0: LevelSize,
    bounds: Box | None,
    segment: Segment | None,
) -> _Seen:
    """Look for the tissue. What could not be read is tried, so that its loss is counted."""
    height, width = overview.unread.shape
    nothing = np.zeros((height, width), np.bool_)
    if guide.mask is not None or spec.tissue != "otsu":
        given = ~nothing
        if segment is not None and guide.mask is None:
            given = segment(overview) | overview.unread
        if guide.mask is not None:
            given = guide.mask.at(width, height, (level0.width, level0.height), bounds) | overview.unread
        return _Seen(given, given, nothing, None)
    tissue = find_tissue(overview.rgb, spec.tissue_threshold)
    coloured = tissue.mask | overview.unread
    artefact = nothing
    if spec.artefacts == "remove":
        artefact = artefact_mask(overview.rgb, tissue.mask) & ~overview.unread
    mask = coloured & ~artefact
    if spec.tissue_closing_px:
        mask = closed(mask, overview.rgb, spec.tissue_closing_px * grid.scale / overview.scale)
    return _Seen(mask, coloured, artefact, tissue)


def _shares(table: Table, overview: Overview, grid: Grid, cells: Cells) -> Shares:
    """Share of each cell (n, 2) that is tissue, by its `integral_image`, of what lies on the slide."""
    height, width = overview.unread.shape
    edges = np.array([width, height, width, height])
    shares = [
        tissue_fraction(table, np.minimum(grid.level0_boxes(some) / overview.scale, edges))
        for some in np.split(cells, range(_AT_ONCE, len(cells), _AT_ONCE))
    ]
    return np.asarray(np.round(np.concatenate(shares), _DECIMALS), np.float64)


def _beyond(table: Table, grid: Grid, level: LevelSize) -> float:
    """Share of the tissue, by its `integral_image`, that lies beyond the patches of the last column and row."""
    size, all_of_it = (table.shape[1] - 1, table.shape[0] - 1), int(table[-1, -1])
    covered = np.minimum((np.array(grid.last) + grid.read_px) / (level.width, level.height), 1) * size
    within = tissue_fraction(table, np.array([[0.0, 0.0, *covered]]))[0] * np.prod(covered)
    return max(0.0, round(1 - float(within / all_of_it), _DECIMALS)) if all_of_it else 0.0


def _enough(share: Shares, spec: TilingConfig) -> Mask:
    return np.asarray((share >= spec.min_tissue) & (share > 0))


def _examples(cells: Cells, share: Shares, kept: Mask, spoilt: Mask) -> tuple[Rejected, ...]:
    artefacts = np.flatnonzero(spoilt)
    artefacts = artefacts[:: max(1, -(-len(artefacts) // (EXAMPLES // 2)))]
    glass = np.flatnonzero(~kept & ~spoilt)
    glass = glass[np.argsort(-share[glass], kind="stable")][: EXAMPLES - len(artefacts)]
    return tuple(
        Rejected(int(cells[place, 0]), int(cells[place, 1]), reason, float(share[place]))
        for reason, places in (("artefact", artefacts), ("tissue", glass))
        for place in places.tolist()
    )


def _nothing(
    share: Shares, spec: TilingConfig, guide: Guide, *, mask: Mask, artefact: Mask, spoilt: Mask, beyond: float
) -> NothingFoundError:
    """Why a slide has no patch: `spoilt` are the places that had enough tissue if artefacts were some.

    `beyond` is the share of the tissue for which there is no place.
    """
    none = f"none of {len(share)} patches is at least {spec.min_tissue:.0%} tissue"
    if guide.mask is not None and not mask.any():
        return NothingFoundError(
            "mask", f"{guide.mask.uri}: names no tissue on this slide; draw it in the mask, or leave the mask out"
        )
    if spoilt.any() or (artefact.any() and not mask.any()):
        rest = f"; of what else is coloured the best has {share.max():.1%}" if mask.any() else ""
        return NothingFoundError(
            "artefact",
            f"{none}: what is coloured is ink by its hue, or has no texture, as tinted glass has none{rest}; look at "
            "the slide, or set tiling.artefacts=keep",
        )
    if beyond > _MOST:
        return NothingFoundError(
            "too-little-tissue",
            f"{none}: {beyond:.0%} of the tissue lies beyond the last column and row; set tiling.edge=inside",
        )
    if mask.any():
        return NothingFoundError(
            "too-little-tissue",
            f"{none}; the best has {share.max():.1%}: the pieces are smaller than a patch; lower tiling.min_tissue or "
            "tiling.patch_px",
        )
    if spec.tissue_model is not None:
        return NothingFoundError(
            "no-tissue",
            f"{none}: the network of tiling.tissue_model finds no {' or '.join(spec.tissue_model.tissue)} on it; look "
            "at the slide, give a mask, or take another network",
        )
    return NothingFoundError(
        "no-tissue", f"{none}: nothing on it is coloured; look at the slide, give a mask, or set tiling.tissue=none"
    )
