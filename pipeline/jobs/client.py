"""Ray's job server, with patience: requests that end, and errors that say what to do."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import requests
from ray.dashboard.modules.dashboard_sdk import SubmissionClient
from ray.dashboard.modules.job.pydantic_models import JobDetails
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from pipeline.errors import ResourceError

_REQUEST_S = 20.0  # of silence; Ray's own requests wait for ever
_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # as Ray takes them, in this order
_TALKATIVE = (
    *("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"),
    "ray._private.runtime_env.packaging",
)
"""Loggers of Ray's that tell of every package and every stream that ends."""
_DEFAULT = "http://127.0.0.1:8265"

Result = TypeVar("Result")


class AwayError(Exception):
    """The job server does not answer, for now or for ever."""


class Client(JobSubmissionClient):
    """As Ray's, whose requests end after 20 s of silence."""

    def _do_request(self, method: str, endpoint: str, **given: Any) -> requests.Response:
        answer: requests.Response = SubmissionClient._do_request(self, method, endpoint, timeout=_REQUEST_S, **given)
        return answer

    def details(self, submission_id: str) -> JobDetails | None:
        """What the server knows of a job; None where it knows of none.

        Raises:
            AwayError: it does not answer.
        """
        response = asked(lambda: self._do_request("GET", f"/api/jobs/{submission_id}"))
        if response.status_code == requests.codes.not_found:
            return None
        if response.status_code != requests.codes.ok:
            raise AwayError(f"{response.status_code}: {response.text.strip()[:200]}")
        return JobDetails(**response.json())


def asked(question: Callable[[], Result]) -> Result:
    """The answer; AwayError where none comes."""
    try:
        return question()
    except (requests.exceptions.RequestException, ConnectionError) as error:
        raise AwayError(type(error).__name__) from error
    except RuntimeError as error:  # what Ray's client makes of every status but 200
        raise AwayError(str(error).strip().splitlines()[0][:200]) from error


def address_of(configured: str | None) -> str:
    """Where the job server is, and so the cluster's dashboard."""
    found = configured or next((os.environ[name] for name in _VARIABLES if os.environ.get(name)), _DEFAULT)
    return found if "://" in found else f"http://{found}"


def connect(configured: str | None) -> Client:
    """The job server.

    Args:
        configured: `deploy.address`.

    Raises:
        ResourceError: it does not answer, or refuses us.
    """
    address = address_of(configured)
    if not address.startswith(("http://", "https://")):
        raise ResourceError(f"{address} is no address of a job server; set deploy.address=http://HEAD:8265")
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # which Ray prefers to what it is told
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        return _in_time(lambda: Client(address))
    except AuthenticationError as error:
        raise ResourceError(
            f"{address} asks for a token: {str(error).strip().splitlines()[0]} Set RAY_AUTH_MODE=token, and copy the "
            "cluster's token to ~/.ray/auth_token"
        ) from error
    except (AwayError, TimeoutError) as error:
        raise ResourceError(
            f"{address}: no job server answers there ({error}); is the head up, with its dashboard? Set deploy.address "
            "or RAY_API_SERVER_ADDRESS to http://HEAD:8265, or forward the port"
        ) from error


def _in_time(make: Callable[[], Client]) -> Client:
    """The client; what Ray finds out at the start it may wait for without end."""
    made: list[Client | BaseException] = []

    def work() -> None:
        try:
            made.append(asked(make))
        except BaseException as error:
            made.append(error)

    thread = threading.Thread(target=work, name="job-server", daemon=True)
    thread.start()
    thread.join(2 * _REQUEST_S)
    if not made:
        raise TimeoutError(f"silent for {2 * _REQUEST_S:.0f} s")
    if isinstance(made[0], BaseException):
        raise made[0]
    return made[0]
