"""A model as a folder: weights.safetensors, which executes nothing when it is read, and config.json."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ips.network.model import IPSModel
from pipeline.config.base import fingerprint
from pipeline.config.model import ModelConfig, SelectConfig
from pipeline.config.recipe import Config
from pipeline.errors import StageError
from pipeline.storage.files import download, exists, is_remote, join, list_names, upload
from pipeline.storage.scratch import scratch_folder
from pipeline.storage.tree import walk

WEIGHTS = "weights.safetensors"
CONFIG = "config.json"
EMBED_WEIGHTS = "embed.weights"
"""Beside a registered model on features: the weights of the network that makes them, in whichever format they had."""
TISSUE_NETWORK = "tissue.network"
"""Beside a registered model whose tiling has one (`tiling.tissue_model`): its file, of the sha256 in the config."""
SEEN = "seen.json"
"""Beside a registered model, and beside the checkpoints of a training: what it was trained and validated on."""

MEMBERS = "members"
"""Of a registered ensemble: a folder for each of its models, and what they share: `EMBED_WEIGHTS`, `TISSUE_NETWORK`."""

_DIGEST = re.compile(r"[0-9a-f]{16}|[0-9a-f]{32}")  # of an ensemble, of a model
_KEPT = re.compile(
    rf"({MEMBERS}/([0-9]{{4}}/)?)?({'|'.join(map(re.escape, (WEIGHTS, CONFIG, EMBED_WEIGHTS, TISSUE_NETWORK)))})"
)
"""Files of `keep_any`."""


@dataclass(frozen=True)
class Seen:
    """What a model has been shown, by which a test on the same is known; no patient's name."""

    slides: frozenset[str]
    """Keys and content digests of slides."""
    patients: frozenset[str]
    """sha256 (hex) of patients' ids."""

    @staticmethod
    def patient(patient_id: str) -> str:
        """As `patients` has it."""
        return hashlib.sha256(patient_id.encode()).hexdigest()

    def has(self, digests: Collection[str]) -> bool:
        """Whether a slide was shown, by its key and its patient's digest."""
        return not (self.slides.isdisjoint(digests) and self.patients.isdisjoint(digests))

    def as_json(self) -> dict[str, list[str]]:
        """Sorted, so that equal ones give equal bytes."""
        return {"slides": sorted(self.slides), "patients": sorted(self.patients)}


def read_seen(folder: Path) -> Seen | None:
    """What stands beside a model; None where nothing does, as of models of earlier versions."""
    if not (folder / SEEN).is_file():
        return None
    known = json.loads((folder / SEEN).read_bytes())
    return Seen(frozenset(known["slides"]), frozenset(known["patients"]))


def save_model(folder: Path, weights: Mapping[str, Tensor], config: Config) -> None:
    """Write `weights.safetensors` and `config.json` into an existing folder."""
    save_file({key: value.detach().cpu().contiguous() for key, value in weights.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(config.model_dump_json(indent=2) + "\n")


def read_config(folder: Path) -> Config:
    """The config saved beside the weights, naming the tissue network that is packed with them (`with_network`).

    Raises:
        StageError: it is absent or of another version.
    """
    if (folder / MEMBERS).is_dir():
        raise StageError(
            f"{folder}: it is an ensemble, which MLflow loads and serves as a whole; name one of its models instead: "
            "the tag `members` of its version lists them"
        )
    try:
        return with_network(Config.model_validate_json((folder / CONFIG).read_bytes()), folder)
    except (OSError, ValidationError) as error:
        raise StageError(
            f"{folder / CONFIG}: cannot be read as a config of this version ({error}); "
            "use the version that wrote it, or train again"
        ) from error


def with_network(config: Config, folder: Path) -> Config:
    """The config with the tissue network beside the model, or beside the models of its ensemble, where there is one.

    What the config names lies where the model was trained. Its `sha256` holds for either, when it is opened.
    """
    network = config.tiling.tissue_model
    places = [folder, folder.parent] if folder.parent.name == MEMBERS else [folder]
    packed = next((path for place in places if (path := place / TISSUE_NETWORK).is_file()), None)
    if network is None or packed is None:
        return config
    here = network.model_copy(update={"uri": str(packed.absolute())})
    return config.model_copy(update={"tiling": config.tiling.model_copy(update={"tissue_model": here})})


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load `weights.safetensors` into a model; StageError names missing and unexpected keys.

    What an earlier version did not name, such as heads, is as the config beside it says.
    """
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise StageError(f"{folder / WEIGHTS}: cannot be read ({error}); restore the file, or train again") from error
    if isinstance(model, IPSModel) and (named := model.named(weights)).keys() != weights.keys():
        if (order := tuple(task.name for task in read_config(folder).tasks)) != model.tasks:
            raise StageError(
                f"{folder / WEIGHTS}: it is of an earlier version, of the tasks {order}, the model has {model.tasks}; "
                f"build it by {folder / CONFIG}"
            )
        weights = named
    own = set(model.state_dict())
    missing, unexpected = sorted(own - set(weights)), sorted(set(weights) - own)
    if missing or unexpected:
        raise StageError(
            f"{folder / WEIGHTS}: missing keys {missing}, unexpected keys {unexpected}: it belongs to another model "
            "or version; use the config and version that wrote it, or train again"
        )
    model.load_state_dict(weights)


def model_digest(config: Config, weights: Sequence[Path]) -> str:
    """Of all that decides a prediction; where a model lies, and what it was trained for, do not.

    `weights` are all files of them: the model's, and those that make its features.
    """
    images = config.cohort.megapixel_mnist
    decides = {
        "tasks": config.model_dump(mode="json", include={"tasks"}),
        "model": _deciding(config.model),
        "tiling": config.tiling.identity(),
        "embed": None
        if config.embed is None
        else config.embed.model_dump(mode="json", exclude={"encoder": {"weights"}}),
        "score_batch": config.train.score_batch,
        "images": None if images is None else images.model_dump(mode="json", exclude={"folder"}),
    }
    hasher = hashlib.sha256(fingerprint(decides).encode())
    for path in weights:
        with path.open("rb") as file:
            hasher.update(hashlib.file_digest(file, "sha256").digest())
    return hasher.hexdigest()[:32]


def _deciding(model: ModelConfig) -> dict[str, Any]:
    """Of a network's fields those that decide a prediction; newer ones where they are not their default.

    So models of before keep their digests, and what is finished by them is not made again.
    """
    dump = model.model_dump(mode="json", exclude={"encoder": {"weights"}, "select": {"learn_from"}})
    if model.select.rank == SelectConfig.model_fields["rank"].default:
        del dump["select"]["rank"]
    return dump


def weight_files(folder: Path) -> list[Path]:
    """Of the model, and of the network that makes its features where it stands beside it."""
    return [path for name in (WEIGHTS, EMBED_WEIGHTS) if (path := folder / name).is_file()]


def _packed_files(folder: Path) -> list[Path]:
    """`weight_files`, and the tissue network where it stands beside them: its sha256 is in the config's digest."""
    network = folder / TISSUE_NETWORK
    return [*weight_files(folder), *([network] if network.is_file() else [])]


def model_folders(folder: Path) -> list[Path]:
    """Of each model of an ensemble, as `member_folders`; of a model its own."""
    members = folder / MEMBERS
    return member_folders(members) if members.is_dir() else [folder]


def member_folders(members: Path) -> list[Path]:
    """Of each model in the folder `members` of an ensemble, in the order of their names.

    Raises:
        StageError: there is none, or a folder that is no model.
    """
    found = sorted(place for place in members.iterdir() if place.is_dir())
    if not found:
        raise StageError(f"{members}: no model is in it; it holds a folder with {WEIGHTS} and {CONFIG} for each model")
    if strays := [place.name for place in found if not (place / WEIGHTS).is_file()]:
        raise StageError(f"{members}: without {WEIGHTS}, so no model: {', '.join(strays)}; take it out, or restore it")
    return found


def shared_config(folder: Path) -> Config:
    """Of a model, or of an ensemble's first one, as all of them take the same patches; errors as `check_one_recipe`."""
    folders = model_folders(folder)
    check_one_recipe(folders)
    return read_config(folders[0])


def check_one_recipe(folders: Sequence[Path]) -> None:
    """StageError names what differs, unless all models take the same patches and give the same outputs."""
    first, *others = [_shared(read_config(folder)) for folder in folders]
    problems = [
        f"{folder}: {name} is {json.dumps(other.get(name))}, and {json.dumps(first.get(name))} of {folders[0].name}"
        for folder, other in zip(folders[1:], others, strict=True)
        for name in sorted(first.keys() | other.keys())
        if first.get(name) != other.get(name)
    ]
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise StageError(
            f"an ensemble is the mean of models of one recipe, and these differ:\n{listed}\nleave the others out"
        )


def _shared(config: Config) -> dict[str, Any]:
    """Field -> what it must be for all models of an ensemble; columns of labels and places may differ."""
    tasks = [task.model_dump(mode="json", include={"name", "kind", "classes", "bins"}) for task in config.tasks]
    embed = config.embed and config.embed.model_dump(mode="json", exclude={"encoder": {"weights"}})
    cohort = config.cohort.model_dump(mode="json", include={"bag", "specimen"})
    images = config.cohort.megapixel_mnist
    return {
        "tasks": tasks,
        "embed": embed,
        "model.encoder (given features)": config.given_features,
        "cohort.megapixel_mnist": images and images.model_dump(mode="json", exclude={"folder"}),
        **{f"cohort.{name}": value for name, value in cohort.items()},
        **{f"tiling.{name}": value for name, value in config.tiling.identity().items()},
    }


def whole_digest(folder: Path) -> str:
    """`model_digest` of a model; of an ensemble, of those of its models and of what makes their features."""
    found = [model_digest(read_config(one), weight_files(one)) for one in model_folders(folder)]
    if not (folder / MEMBERS).is_dir():
        return found[0]
    shared = [hashlib.sha256(path.read_bytes()).hexdigest() for path in weight_files(folder / MEMBERS)]
    return fingerprint([*found, *shared])[:32]


def keep_any(folder: Path, uri: str) -> None:
    """As `keep_model`, of an ensemble too; each model's files, and what makes the features of all.

    Nothing is removed at `uri`: another model needs another place. Models are named by their number, so that an
    ensemble of one `whole_digest` has the same files whatever its folders are called.
    """
    if not (folder / MEMBERS).is_dir():
        keep_model(folder, uri)
        return
    for number, one in enumerate(model_folders(folder)):
        keep_model(one, join(uri, MEMBERS, f"{number:04d}"))
    for path in _packed_files(folder / MEMBERS):
        upload(path, join(uri, MEMBERS, path.name))


def is_kept(uri: str) -> bool:
    """Whether a place named by a digest holds what `keep_any` writes of that model, all of it and nothing else."""
    place = uri.rstrip("/") + "/"
    names = [str(file.uri).removeprefix(place) for file in walk(uri)]
    if not _DIGEST.fullmatch(place.split("/")[-2]) or not all(map(_KEPT.fullmatch, names)):
        return False
    with ExitStack() as stack:
        try:
            return whole_digest(at_hand(uri, stack)) == place.split("/")[-2]
        except (StageError, OSError):  # a file is missing, or another release wrote it
            return False


def keep_model(folder: Path, uri: str) -> None:
    """Copy what predicting takes to where every worker finds it."""
    for path in (folder / CONFIG, *_packed_files(folder)):
        upload(path, join(uri, path.name))


def at_hand(uri: str, stack: ExitStack) -> Path:
    """The files of a kept model as local ones, until the stack ends."""
    if not is_remote(uri):
        return Path(uri)
    local = stack.enter_context(scratch_folder())
    _fetch(uri, local)
    if names := list_names(join(uri, MEMBERS)):
        _fetch(join(uri, MEMBERS), local / MEMBERS)
        for name in names:
            if name not in (EMBED_WEIGHTS, TISSUE_NETWORK):
                _fetch(join(uri, MEMBERS, name), local / MEMBERS / name)
    return local


def _fetch(uri: str, local: Path) -> None:
    local.mkdir(exist_ok=True)
    for name in (WEIGHTS, CONFIG, EMBED_WEIGHTS, TISSUE_NETWORK):
        if exists(join(uri, name)):
            download(join(uri, name), local / name)
