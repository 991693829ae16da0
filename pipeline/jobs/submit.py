"""A command as a Ray job: the same one twice is one job, and whoever asks for it again follows the one that runs."""

from __future__ import annotations

import logging
import os
import re
import shlex
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import requests
from ray.dashboard.modules.job.pydantic_models import JobDetails

from pipeline.config.base import fingerprint
from pipeline.config.recipe import Config
from pipeline.credentials import is_secret_variable, masked, secret_within
from pipeline.errors import ConfigError, ResourceError
from pipeline.jobs.client import AwayError, Client, asked
from pipeline.jobs.follow import STOP_WAIT_S, Job
from pipeline.jobs.package import EXCLUDES, Package, look_at
from pipeline.jobs.record import NONCE, RECORD, record_uri
from pipeline.logs import VARIABLE

log = logging.getLogger(__name__)

_PROGRAM = ("python", "-m", "pipeline")
_ID_CHARS = 63  # of a submission id without its attempt: it names files and a Kubernetes label


@dataclass(frozen=True)
class Order:
    """What is to be run, ready to be sent."""

    stem: str
    """Of its submission ids: name and fingerprint."""
    entrypoint: str
    package: Package
    env: Mapping[str, str]
    root: str

    def job(self, attempt: int, nonce: str) -> Job:
        """This order's job of a number."""
        submission_id = f"{self.stem}-{attempt}"
        return Job(submission_id, record_uri(self.root, submission_id), nonce)


def prepare(config: Config, arguments: Sequence[str], folder: Path) -> Order:
    """An order for `python -m pipeline ARGUMENTS` in a copy of a folder.

    Raises:
        ConfigError: what would travel is too large or holds a secret; a variable that is to travel is unset or holds
            one. All at once.
    """
    package = look_at(folder, config.deploy.package_mb, os.environ)
    env = _variables(config.deploy.env, os.environ)
    said = [argument for argument in arguments if not argument.startswith("deploy.")]
    identity = {"arguments": said, "config": config.model_dump(mode="json", exclude={"deploy"}), "code": package.digest}
    stem = f"{config.name[: _ID_CHARS - 17]}-{fingerprint({**identity, 'env': dict(env)})}"
    return Order(stem, shlex.join([*_PROGRAM, *arguments]), package, env, config.storage.root)


def _variables(names: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that a job gets, by name, as they are here."""
    problems = [f"deploy.env: {name} is not set here" for name in names if name not in environment]
    found = {name: environment[name] for name in names if name in environment}
    for name, value in found.items():
        if (secret := secret_within(value, environment)) is not None or masked(value) != value:
            held = f"the value of {secret}" if secret else "a password or token"
            problems.append(
                f"deploy.env: {name} holds {held}, and Ray keeps what a job is given; put it into the environment of "
                "every node (deploy.secrets)"
            )
    if problems:
        raise ConfigError("the job's environment", problems)
    if VARIABLE in environment:
        found[VARIABLE] = environment[VARIABLE]
    return found


def submit(client: Client, order: Order) -> tuple[Job, bool]:
    """The job, and whether it was begun now: one of the same order that runs is found, and no other is begun.

    Raises:
        ResourceError: the server does not take it.
    """
    try:
        former = _former(client, order.stem)
        if (running := _running(former, order)) is not None:
            return running, False
        job = order.job(1 + max(former, default=0), uuid.uuid4().hex)
        try:
            client.submit_job(
                entrypoint=order.entrypoint,
                submission_id=job.submission_id,
                runtime_env=_runtime_env(order, job),
                metadata={"record": job.record, "nonce": job.nonce},
            )
        except (RuntimeError, requests.exceptions.RequestException) as error:
            taken = client.details(job.submission_id)
            if taken is None:
                raise ResourceError(f"the job server refuses the job: {_reason(error)}") from error
            known = _known(taken, order)  # another one was faster, or the answer alone was lost
            return known, known == job
    except AwayError as away:
        raise ResourceError(f"the job server does not answer any more ({away}); run the same command again") from away
    return job, True


def _reason(error: Exception) -> str:
    """The last line of a trace that the server sends as its answer."""
    return str(error).strip().replace("\\n", "\n").rstrip("\"'. \n").splitlines()[-1][:300]


def _former(client: Client, stem: str) -> dict[int, JobDetails]:
    """The jobs of an order, by attempt."""
    found = {}
    for details in asked(client.list_jobs):
        number = re.fullmatch(rf"{re.escape(stem)}-(\d+)", details.submission_id or "")
        if number is not None:
            found[int(number[1])] = details
    return found


def _running(former: Mapping[int, JobDetails], order: Order) -> Job | None:
    live = [details for details in former.values() if not details.status.is_terminal()]
    return _known(live[-1], order) if live else None


def _known(details: JobDetails, order: Order) -> Job:
    """The job behind what the server tells."""
    told = details.metadata or {}
    submission_id = str(details.submission_id)
    return Job(submission_id, told.get("record", record_uri(order.root, submission_id)), told.get("nonce", ""))


def _runtime_env(order: Order, job: Job) -> dict[str, object]:
    own = {
        RECORD: job.record,
        NONCE: job.nonce,
        "RAY_JOB_STOP_WAIT_TIME_S": f"{STOP_WAIT_S:.0f}",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }
    assert not any(map(is_secret_variable, own))
    return {"working_dir": str(order.package.folder), "excludes": list(EXCLUDES), "env_vars": {**order.env, **own}}
