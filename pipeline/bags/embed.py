"""Patches to features: a frozen network over committed slides, on Ray Data's actors.

Each actor holds one copy of the network, on a GPU where it was given one, and takes one slide after another; vectors
go straight to the store. A killed run goes on with the slides that are not committed.
"""

from __future__ import annotations

import hashlib
import pickle
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ips.bag import Chunk
from ips.network.encoder import TwoScales
from pipeline.bags.patch_bag import PatchBag
from pipeline.bags.shared import rechunked
from pipeline.bags.streamed import EmbeddedSlide
from pipeline.config.embed import EmbedConfig
from pipeline.errors import NodeError, StageError, StorageError
from pipeline.model.build import build_encoder
from pipeline.storage import files
from pipeline.storage.attempts import MAX_ATTEMPTS, attempt
from pipeline.storage.files import SourceVersion
from pipeline.store.catalogue import Row
from pipeline.store.features import Features, FeatureSlide, FeatureStore
from pipeline.store.patches import StoredSlide
from pipeline.telemetry import add, drain, spending

TOGETHER = 256  # slides whose features one file of the catalogue commits, at least
PACK_PATCHES = 2048  # of small slides that are embedded together: a minute on a CPU; 4 to 16 MB of features
_DTYPES = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}


class Embedder:
    """One copy of the network, on the GPU where the process has one."""

    def __init__(self, config: EmbedConfig) -> None:
        self.config = config
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        encoder, self.dim = build_encoder(config.encoder)
        self._encoder = encoder.to(self._device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self._both = TwoScales(self._encoder)
        self._mean, self._std = (
            torch.tensor(values, device=self._device).view(-1, 1, 1) for values in (config.mean, config.std)
        )

    def __call__(self, pixels: Tensor) -> Features:
        """(n, 3, p, p) uint8 -> (n, D), the same whatever n is: the network always sees `batch` patches.

        With surroundings (n, 3, 2p, p) -> (n, 2D), those of the patches first.

        Raises:
            StageError: a feature is not finite.
        """
        vectors = [self._batch(part) for part in torch.split(pixels, self.config.batch)]
        features: Features = np.concatenate(vectors)
        if not np.isfinite(features).all():
            raise StageError(
                f"embed: a feature is not finite as embed.dtype={self.config.dtype}; set embed.dtype=float32, or mend "
                "embed.encoder.weights"
            )
        return features

    def _batch(self, pixels: Tensor) -> Features:
        short = self.config.batch - len(pixels)
        padded = torch.cat([pixels, pixels.new_zeros(short, *pixels.shape[1:])]) if short else pixels
        compute = _DTYPES[self.config.compute_dtype]
        with torch.inference_mode(), torch.autocast(self._device.type, compute, enabled=compute != torch.float32):
            with spending("transfer"):
                there = padded.to(self._device)
            with spending("encode"):
                scaled = (there.float() / 255 - self._mean) / self._std
                encoder = self._both if pixels.shape[2] == 2 * pixels.shape[3] else self._encoder
                vectors = encoder(scaled.contiguous(memory_format=torch.channels_last))
                found: Features = vectors[: len(pixels)].to(_DTYPES[self.config.dtype]).cpu().numpy()
        return found


def encoder_fingerprint(config: EmbedConfig) -> str:
    """Digest of the encoder: its settings and the content of its weights.

    Raises:
        StorageError: the weights cannot be read.
    """
    uri = config.encoder.weights
    return config.fingerprint(None if uri is None else _content(uri, files.source_version(uri)))


@lru_cache(maxsize=8)
def _content(uri: str, version: SourceVersion) -> str:
    return hashlib.sha256(files.read_bytes(uri)).hexdigest()


@lru_cache(maxsize=1)
def shared_embedder(config: EmbedConfig) -> Embedder:
    """The process's copy: loading the weights takes seconds."""
    return Embedder(config)


class EmbeddedBag:
    """The features of slides as an `ips` bag, made chunk by chunk of their patches: nothing is written, none are kept.

    What is taken again is made again, which gives the same vectors.

    Args:
        slides: of one encoder; their rows follow one another.
        threads: that may decode at a time.
    """

    def __init__(self, slides: Sequence[EmbeddedSlide], threads: int) -> None:
        self._patches = PatchBag([slide.pixels for slide in slides], threads=threads, augment=None)
        self._config = slides[0].config

    def __len__(self) -> int:
        return len(self._patches)

    def chunks(self, size: int) -> Iterator[Chunk]:
        """Every row once, in order; errors as `PatchBag.chunks`, and StageError where a feature is not finite."""
        return self.strip(size, 0, len(self))

    def strip(self, size: int, start: int, stop: int) -> Iterator[Chunk]:
        """Rows `start` to `stop`, as `chunks` gives all; the network sees whole batches, whatever `size` is."""
        return rechunked(map(self._made, self._patches.strip(self._config.batch, start, stop)), size)

    def take(self, rows: Tensor) -> Chunk:
        """The features of `rows` (n,) int64, in that order."""
        return self._made(self._patches.take(rows))

    def _made(self, chunk: Chunk) -> Chunk:
        vectors = torch.from_numpy(shared_embedder(self._config)(chunk.patches))
        return Chunk(vectors, chunk.index, chunk.positions)


def embed_slide(embedder: Embedder, stored: StoredSlide, store: FeatureStore, threads: int) -> FeatureSlide:
    """The features of one slide, made here and now unless they are committed.

    Raises:
        StorageError: a store cannot be read or written.
        StageError: a feature is not finite.
    """
    known = store.written(stored)
    if known is not None:
        return known
    bag = PatchBag([stored], threads=threads, augment=None)
    chunks = (embedder(chunk.patches) for chunk in bag.chunks(embedder.config.batch))
    return store.write(stored, chunks, embedder.config.model_dump(mode="json"))


def embed_together(embedder: Embedder, slides: Sequence[StoredSlide], store: FeatureStore, threads: int) -> list[Row]:
    """The features of small slides, put into one pack; what commits them. Errors as `embed_slide`."""
    bag = PatchBag(slides, threads=threads, augment=None)
    vectors = np.concatenate([embedder(chunk.patches) for chunk in bag.chunks(embedder.config.batch)])
    ends = np.cumsum([slide.n_patches for slide in slides])
    made = list(zip(slides, np.split(vectors, ends[:-1]), strict=True))
    return store.pack(made, embedder.config.model_dump(mode="json"))


def embed_slides(
    slides: Sequence[StoredSlide],
    config: EmbedConfig,
    store: FeatureStore,
    *,
    actors: tuple[int, int],
    cpus: float,
    gpus: float,
    on_done: Callable[[str], None],
) -> None:
    """Embed the slides that are not committed yet, on an initialised Ray.

    Args:
        slides: each once; those in front begin first.
        config: what with.
        store: where to.
        actors: least and most copies of the network.
        cpus: that Ray reserves for each.
        gpus: likewise.
        on_done: called with the key of every slide made.

    Raises:
        StorageError, StageError: as `embed_slide`; what is committed stays.
    """
    missing = set(store.gone([slide.key for slide in slides]))
    pending = [slide for slide in slides if slide.key in missing]
    if not pending:
        return
    store.forget_gone()  # what is made in their place may be otherwise
    store.look_again()  # what was seen need not travel
    import ray.data  # loads for seconds

    groups = _together(pending)
    most = max(1, min(actors[1], len(groups)))
    run = uuid.uuid4().hex
    rows = [{"slides": pickle.dumps(group), "name": f"{run}-{group[0].key}"} for group in groups]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        _Actor,
        fn_constructor_kwargs={"config": config, "store": store, "threads": max(1, int(cpus))},
        compute=ray.data.ActorPoolStrategy(min_size=min(actors[0], most), max_size=most),
        num_cpus=cpus,
        num_gpus=gpus,
    )
    made: list[Row] = []
    try:
        for row in dataset.iter_rows():
            add(pickle.loads(row["sums"]))
            if row["failure"]:
                raise pickle.loads(row["failure"])
            done = pickle.loads(row["rows"])
            made += done
            for one in done:
                on_done(one["key"])
            if len(made) >= TOGETHER:
                store.append(made)
                made.clear()
    finally:
        store.append(made)


def _together(slides: Sequence[StoredSlide]) -> list[list[StoredSlide]]:
    """Each slide with a folder alone; those in packs with others, in the same order."""
    groups: list[list[StoredSlide]] = [[slide] for slide in slides if slide.place is None]
    patches = PACK_PATCHES
    for slide in slides:
        if slide.place is not None:
            if patches >= PACK_PATCHES:
                groups.append([])
                patches = 0
            groups[-1].append(slide)
            patches += slide.n_patches
    return groups


class _Actor:
    """One Ray Data row to another; what fails is data here, so that Ray neither retries nor wraps it."""

    def __init__(self, config: EmbedConfig, store: FeatureStore, threads: int) -> None:
        torch.set_num_threads(threads)
        self._store, self._threads = store, threads
        self._embedder = Embedder(config)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        slides: list[StoredSlide] = pickle.loads(row["slides"])
        made: list[Row] = []
        failure: Exception | None = None
        try:
            with attempt(row["name"]) as attempts:
                try:
                    made = self._rows(slides, attempts)
                except (StorageError, StageError) as error:
                    failure = error
        except NodeError as full:
            failure = full
        failed = b"" if failure is None else pickle.dumps(failure)
        return {"rows": pickle.dumps(made), "failure": failed, "sums": pickle.dumps(drain())}

    def _rows(self, slides: Sequence[StoredSlide], attempts: int) -> list[Row]:
        first = slides[0]
        if attempts > MAX_ATTEMPTS:
            killed = (
                f"its process was killed {MAX_ATTEMPTS} times, as Ray and the kernel do where memory runs out; lower "
                f"embed.batch={self._embedder.config.batch}"
            )
            raise StageError(f"embed: {first.uri}: {killed}")
        if first.place is not None:
            return embed_together(self._embedder, slides, self._store, self._threads)
        embed_slide(self._embedder, first, self._store, self._threads)
        return self._store.rows(first.key)
