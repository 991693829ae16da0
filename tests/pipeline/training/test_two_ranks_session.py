"""A session on two gloo processes: its validation is that of one, and an error of one process ends both."""

from __future__ import annotations

import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.multiprocessing.spawn import spawn

from ips.bag import Bag
from pipeline.bags.augment import Augment
from pipeline.bags.sources import Source, open_bag
from pipeline.errors import StorageError
from pipeline.inference.prediction import load_model
from pipeline.model.checkpoint import Progress
from pipeline.store.patches import StoredSlide
from pipeline.tracking.tracker import open_tracking
from pipeline.training import session
from pipeline.training.loop import StepDone
from pipeline.training.ranks import Ranks, joined_ranks
from pipeline.training.session import Job, run_session
from tests.gloo import one_of_two
from tests.pipeline.small import small_config, store_slides, write_cohort

LABELS = ["no", "yes"] * 5 + ["no"]  # the last seven to look at
CPU = torch.device("cpu")
LAST = StepDone(1, 2, last_of_epoch=True, loss=0.5, lr=1e-5, slides=4, patches=80, read=80, seconds=1.0, waited=0.0)
MEASURES = ("val_auc_tumour", "val_accuracy_tumour", "val_threshold_tumour", "val_loss", "val_score")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, mlflow_uri: str) -> Job:
    """Two epochs, each with a look."""
    folder = tmp_path_factory.mktemp("two")
    config = small_config(
        train={"epochs": 2, "batch_size": 4, "lr": 1e-2, "warmup_epochs": 1, "validate_every": 1},
        cluster={"cpus_per_worker": 1, "workers": 2},
    )
    slides = store_slides(write_cohort(folder, LABELS), folder / "store", config)
    tracker = open_tracking(mlflow_uri, "two ranks", str(folder / "artifacts"))
    run = tracker.start_run("train")
    return Job(config, tuple(slides[:4]), tuple(slides[4:]), "plan", str(folder / "run"), tracker, run)


def _worker(rank: int, folder: str) -> None:
    with one_of_two(rank, folder):
        Path(folder, str(rank)).write_bytes(_ended(pickle.loads(Path(folder, "job").read_bytes())))


def _ended(job: Job) -> bytes:
    """What this rank ended with, and the validation slides that it opened, pickled: an error comes without frames."""
    opened: list[str] = []
    keys = {source.key for _, source in job.val}

    def recorded(source: Source, *, threads: int, augment: Augment | None) -> Bag:
        opened.extend([source.key] if source.key in keys else [])
        return open_bag(source, threads=threads, augment=augment)

    with mock.patch.object(session, "open_bag", recorded):
        try:
            return pickle.dumps((run_session(job, joined_ranks(), CPU, None), opened))
        except StorageError as error:
            return pickle.dumps((error, opened))


def _on_two(job: Job, folder: Path) -> list[tuple[Progress | Exception, list[str]]]:
    """What each rank ended with, and the validation slides that it opened."""
    (folder / "job").write_bytes(pickle.dumps(job))
    spawn(_worker, args=(str(folder),), nprocs=2)  # type: ignore[no-untyped-call]
    return [pickle.loads((folder / str(rank)).read_bytes()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_two_ranks_validate_as_one_does_each_its_part(job: Job, tmp_path: Path) -> None:
    (progress, mine), (_, others) = _on_two(job, tmp_path)
    assert isinstance(progress, Progress)
    keys = [source.key for _, source in job.val]
    assert sorted(mine + others) == sorted(keys * 2)
    assert {len(mine), len(others)} == {6, 8}
    model, _ = load_model(Path(job.folder) / progress.name)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = session._look(model, job, Ranks(), CPU, LAST)
    finally:
        torch.set_num_threads(threads)
    assert alone is not None
    assert set(alone) == set(MEASURES)
    assert {name: progress.metrics[name] for name in MEASURES} == alone


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_validation_slide_that_is_gone_ends_both_ranks_with_its_error(job: Job, tmp_path: Path) -> None:
    slide, source = job.val[-1]
    assert isinstance(source, StoredSlide)
    shutil.copytree(source.uri, tmp_path / "slide")
    broken = replace(source, uri=str(tmp_path / "slide"))
    for part in (tmp_path / "slide").glob("part-*"):
        part.unlink()
    spoilt = replace(job, val=(*job.val[:-1], (slide, broken)), folder=str(tmp_path / "run"))
    found = [result for result, _ in _on_two(spoilt, tmp_path)]
    assert [type(error) for error in found] == [StorageError, StorageError]
    assert str(found[0]) == str(found[1])
    assert str(tmp_path / "slide") in str(found[0])
