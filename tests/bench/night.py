"""A night's retraining on a catalogue of many: `python -m tests.bench.night`, minutes; --s3 for a bucket.

So many slides are tiled, and were learned from, and some new ones land (`tests.bench.cohort` makes the known ones by
cloning). Then what `retrain` does until it trains, part by part, each in a process of its own:

- *look*: the cohort, the versions of its files, and what is different since the last night
- *plan*: the command, which says what `run` would do
- *tile*: the new ones, with page, ledgers and record
- *choose*: splits, the share of the old slides that is replayed, who is stored where, the training's identity and an
  epoch's plan for two workers, and what the next night is to know

CPU seconds, largest memory and requests of each.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from PIL import Image

from pipeline.config.base import fingerprint
from pipeline.config.compose import load_config
from pipeline.config.recipe import Config
from pipeline.release.arrivals import Seen, contents, diff, last_contents, last_seen, look, remember
from tests.bench.cohort import EDGE, Cost, Place, cost_of, measured, placed, report, write_cohort, write_study
from tests.synth import tissue_rgb

REPLAY = 0.2  # of the slides that the champion learned from
OLD_MODEL = "0" * 16  # fingerprint of its training


def config_of(place: Place) -> Config:
    """Of all parts."""
    return load_config("default", [*place.overrides(), "gate.approval=true"])


def last_night(config: Config) -> None:
    """Leave what a retraining leaves that ended with all slides there are."""
    from pipeline.release.trained import Trained, write_trained
    from pipeline.workflow.run import finished, load_cohort

    found, keys = look(config), finished(config, "tile").keys
    slides = [s for s in load_cohort(config, needs_labels=True).slides if s.split == "train"]
    learned = {
        "keys": sorted(keys[s.slide_id] for s in slides),
        "patients": [fingerprint(s.patient_id) for s in slides],
    }
    trained = Trained(learned, [fingerprint(s.slide_id) for s in slides], found.rows, contents(keys))
    write_trained(config.storage.root, OLD_MODEL, trained)
    remember(
        config.storage.root, Seen(found.digest, time.time(), time.time(), "promoted", None, found.rows), contents(keys)
    )


def looked(config: Config) -> dict[str, int]:
    """What `retrain` does first; how much is new."""
    found, seen = look(config), last_seen(config.storage.root)
    assert seen is not None
    assert seen.digest != found.digest
    return diff(seen.rows, found.rows).counts


def chosen(config: Config) -> dict[str, int]:
    """What is between the tile stage and the first step of training; how many slides are to be read."""
    from pipeline.release.trained import read_trained, replayed
    from pipeline.training.plan import dealt, epoch_batches
    from pipeline.workflow.embed import stages_for
    from pipeline.workflow.run import finished, load_cohort
    from pipeline.workflow.stage import Workspace, learned

    def unused() -> None:
        raise AssertionError

    record, trained = finished(config, "tile"), read_trained(config.storage.root, OLD_MODEL)
    cohort = replayed(trained, REPLAY, config.seed)(load_cohort(config, needs_labels=True))
    space = Workspace(config, cohort, unused, unused, {}, {"tile": record})  # type: ignore[arg-type]
    slides, validation = space.stored("train"), space.stored("val")
    (stage,) = [stage for stage in stages_for(config, "train") if stage.name == "train"]
    fingerprint(stage.identity(space))
    learned([*slides, *validation])
    sizes = [source.n_patches for _, source in slides]
    batches = epoch_batches(sizes, batch_size=config.train.batch_size, seed=config.seed, epoch=0)
    for batch in batches:
        dealt(batch, sizes, 2, config.train.shard_above)
    found, holds = look(config), contents(record.keys)
    diff(
        {} if trained is None or trained.rows is None else trained.rows,
        found.rows,
        last_contents(config.storage.root),
        holds,
    )
    remember(config.storage.root, Seen(found.digest, time.time(), time.time(), "held", None, found.rows), holds)
    return {"slides": len(slides), "validation": len(validation), "steps": len(batches)}


PARTS = {"last night": last_night, "look": looked, "choose": chosen}


def night(known: int, new: int, *, s3: bool) -> list[Cost]:
    """All parts."""
    with tempfile.TemporaryDirectory() as scratch, placed(Path(scratch), s3=s3) as (place, env, fresh):
        write_study(place, known, packed=True)

        def part(name: str) -> Cost:
            return cost_of(
                ["-m", "tests.bench.night", "--part", name, str(place.folder), place.uri], name, known, env, fresh
            )

        measured("tile", known, place, env, fresh)
        part("last night")
        picture = Image.fromarray(tissue_rgb(EDGE, EDGE, seed=9))
        for number in range(known, known + new):
            picture.save(place.folder / "slides" / f"{number:07d}.jpg", quality=85, comment=f"{number}".encode())
        write_cohort(place, known + new)
        steps = [part("look"), measured("plan", known, place, env, fresh), measured("tile", known, place, env, fresh)]
        return [*steps, part("choose")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--known", type=int, default=100_000)
    parser.add_argument("--new", type=int, default=200)
    parser.add_argument("--s3", action="store_true", help="on a real S3 server behind a counting proxy")
    options = parser.parse_args()
    costs = night(options.known, options.new, s3=options.s3)
    print(report(costs))
    print(json.dumps([asdict(cost) for cost in costs]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        _, _, name, folder, uri = sys.argv
        print(name, PARTS[name](config_of(Place(Path(folder), uri))), file=sys.stderr)
    else:
        main()
