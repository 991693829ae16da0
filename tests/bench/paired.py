"""Two commits by turns on the lines of `tests.bench.tiling` that cost: `python -m tests.bench.paired OTHER_WORKTREE`.

Each part runs in processes of its own, one of the other tree, one of this, and again the other way round; of each side
the best round counts, in CPU time, of which busy neighbours lengthen every round a little and the best one least.
Memory is allocated as the processes that tile do it (`child.MALLOC`); else how often the heap is given back and asked
for again, by where a tree's modules happen to lie, decides some lines. A table as Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.slides.open import open_slide
from pipeline.store.commit import plan_slide, write_slide
from pipeline.store.patches import PatchStore
from pipeline.tiling.cutting import Cutter
from pipeline.tiling.slide import tile_slide
from tests.bench import tiling
from tests.bench.canvas import repeat, write_canvas

HERE = Path(__file__).parents[2]
INSIDE = 3  # times that a process does its work; the best counts
CUT = 1500  # patches that are read or encoded
SLIDES = 4  # of 2,304 patches, through the stage on Ray
CODECS = {"original": tiling.ALIGNED, "checked": tiling.CHECKED}


def best(work: Callable[[], object], patches: int) -> float:
    """us of CPU time a patch."""
    return 1e6 * min(tiling.cpu(work) for _ in range(INSIDE)) / patches


def unaligned(slide: Path, kind: str) -> float:
    """Decoded to RGB, or encoded too."""
    with open_slide(slide) as reader:
        planned = tile_slide(reader, tiling.UNALIGNED, 0.5)
        origins = planned.grid.level_origins(planned.cells)[:CUT]
    if kind == "rgb":
        return best(lambda: tiling.read_all(slide, origins.tolist(), 224), CUT)

    def encoded() -> None:
        with open_slide(slide) as reader:
            cutter: Any = Cutter(reader, planned.grid, tiling.UNALIGNED)
            if hasattr(cutter, "each"):
                deque(cutter.each(origins), maxlen=0)
            else:  # before 2026-11-28
                cutter.expect(origins)
                for x, y in origins.tolist():
                    cutter.cut(x, y)

    return best(encoded, CUT)


def committed(slide: Path, codec: str, folder: Path) -> float:
    """A whole aligned slide into the store, digests and fsync included."""
    spec = CODECS[codec]
    with open_slide(slide) as reader:
        planned = plan_slide("0" * 64, 0.5, reader, tile_slide(reader, spec, 0.5))
        store = PatchStore(str(folder / codec), spec.fingerprint())
        write_slide(store, planned, lambda: None)  # loads what is loaded once
        return best(lambda: write_slide(store, planned, lambda: None), len(planned.tiling.cells))


def back(slide: Path, folder: Path) -> float:
    """Every patch read again by a bag."""
    from pipeline.bags.patch_bag import PatchBag

    committed(slide, "original", folder)
    (stored,) = tiling.iter_slides(folder / "original")
    return best(lambda: deque(PatchBag([stored], threads=1, augment=None).chunks(256), maxlen=0), stored.n_patches)


def access(slide: Path, folder: Path) -> float:
    """128 patches at random, by range reads."""
    committed(slide, "original", folder)
    (stored,) = tiling.iter_slides(folder / "original")
    stored.index()
    rows = np.random.default_rng(0).choice(stored.n_patches, 128, replace=False)
    return best(lambda: [stored.payloads(rows) for _ in range(20)], 20 * 128)


def memory(slide: Path, kind: str, folder: Path) -> float:
    """MiB at most of a task."""
    return tiling.in_process("tile", kind, slide, folder / kind)["mib"]


def stage(codec: str, slides: list[Path], folder: Path) -> float:
    """s of CPU time of a cohort on Ray, which was started before."""
    return tiling.in_process("stage", codec, folder / codec, *slides)["cpu_s"]


PARTS: dict[str, tuple[str, Callable[[Path, list[Path], Path], float]]] = {
    "not aligned, to RGB": ("us a patch", lambda slide, _, __: unaligned(slide, "rgb")),
    "not aligned, encoded": ("us a patch", lambda slide, _, __: unaligned(slide, "encoded")),
    "aligned, committed": ("us a patch", lambda slide, _, folder: committed(slide, "original", folder)),
    "aligned, decoded once, committed": ("us a patch", lambda slide, _, folder: committed(slide, "checked", folder)),
    "reading patches back, a thread": ("us a patch", lambda slide, _, folder: back(slide, folder)),
    "random access": ("us a patch", lambda slide, _, folder: access(slide, folder)),
    "memory, aligned": ("MiB", lambda slide, _, folder: memory(slide, "aligned", folder)),
    "memory, not aligned": ("MiB", lambda slide, _, folder: memory(slide, "unaligned", folder)),
    "the stage on Ray, original": ("s", lambda _, slides, folder: stage("original", slides, folder)),
    "the stage on Ray, checked": ("s", lambda _, slides, folder: stage("checked", slides, folder)),
}


def run(tree: Path, part: str, slides: Path) -> float:
    """One part by one tree, in a process of its own."""
    from pipeline.ingest.child import MALLOC  # the part's process may have another tree, before it was there

    with tempfile.TemporaryDirectory(dir=slides) as folder:
        command = [sys.executable, "-P", __file__, "--part", part, str(slides), folder]
        env = {**os.environ, **MALLOC, "PYTHONPATH": str(tree), "PYTHONPYCACHEPREFIX": str(slides / "bytecode")}
        env.pop("PYTHONDONTWRITEBYTECODE", None)  # or each process would compile all modules, as no installed one does
        done = subprocess.run(command, cwd=tree, env=env, stdout=subprocess.PIPE, text=True, check=True)
        return float(json.loads(done.stdout.splitlines()[-1]))


def compare(other: Path, rounds: int, names: list[str]) -> None:
    """Print a line for each part, as it is known."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        canvas = write_canvas(folder / "canvas.tiff")
        repeat(canvas, folder / "medium.tiff", 3, 3)  # 20,736 tiles
        for number in range(SLIDES):
            repeat(canvas, folder / f"slide-{number}.tiff", 1, 1, salt=number + 1)
        print(f"| | {other.name} | {HERE.name} | | all rounds |\n|---|---|---|---|---|", flush=True)
        for name in names:
            found: dict[Path, list[float]] = {other: [], HERE: []}
            for number in range(rounds):
                for tree in (other, HERE) if number % 2 == 0 else (HERE, other):  # a neighbour may keep time with one
                    found[tree].append(run(tree, name, folder))
            pairs = list(zip(found[other], found[HERE], strict=True))
            before, now = (min(side) for side in zip(*pairs, strict=True))
            told = "; ".join(f"{one:.4g}, {two:.4g}" for one, two in pairs)
            change = 100 * (now / before - 1)
            print(f"| {name} | {before:.4g} {PARTS[name][0]} | {now:.4g} | {change:+.1f}% | {told} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="a worktree of the other commit")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    compare(options.other.resolve(), options.rounds, options.only)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        _, _, name, slides, folder = sys.argv
        many = sorted(Path(slides).glob("slide-*.tiff"))
        print(json.dumps(PARTS[name][1](Path(slides, "medium.tiff"), many, Path(folder))))
    else:
        main()
