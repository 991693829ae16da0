"""Every error a user can cause or meet, and the exit code each one ends the program with.

PipelineError                exit 1
├── ConfigError              exit 2   a config field is wrong: all problems at once
├── CohortError              exit 2   the cohort file is wrong: all problems at once, with row numbers
├── StorageError             exit 1   a URI cannot be read or written
│   ├── DamagedError          exit 1   what is stored is not what was written
│   └── NodeError             exit 1   a node's own disk cannot be written: no slide's fault
├── SlideError               exit 1   one slide cannot be used; the tile stage quarantines it and goes on
│   ├── BadTileError         exit 1   one tile of a slide cannot be decoded; costs the patches it touches
│   └── PlanError            exit 1   a slide's plan names a patch that cannot be decoded; it is planned anew
├── DataBudgetError          exit 3   more bad slides or tiles than the config allows (`verify`: a damaged store)
├── ReleaseError             exit 4   the champion is not the one that was decided against, or nobody may be promoted
├── ResourceError            exit 5   the cluster can never give what was asked for, or does not answer
├── TrackingError            exit 1   MLflow cannot be reached or refuses
├── StageError               exit 1   a stage cannot run: an earlier one is missing, or training diverged
└── Interrupted              exit 128 + signal (130 for SIGINT, 143 for SIGTERM)
"""

from __future__ import annotations

import signal
from collections.abc import Sequence

from pipeline.credentials import masked


class PipelineError(Exception):
    """Base of the tree; the message names the file or field, the reason and the remedy, and never a credential."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(masked(message))

    @property
    def may_pass(self) -> bool:
        """Whether the same work may succeed when it is begun again, with nothing mended."""
        return False


class _ListedError(PipelineError):
    """An error that reports several problems of one input at once."""

    exit_code = 2

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.source = masked(source)
        self.problems = tuple(masked(problem) for problem in problems)
        count = f"{len(problems)} problem" + ("s" if len(problems) != 1 else "")
        super().__init__(f"{source}: {count}\n" + "\n".join(f"  - {problem}" for problem in problems))

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.source, self.problems)  # crosses process borders (Ray) intact


class ConfigError(_ListedError):
    """The configuration is wrong."""


class CohortError(_ListedError):
    """The cohort file is wrong."""


class StorageError(PipelineError):
    """A URI cannot be read or written."""

    @property
    def may_pass(self) -> bool:
        """A storage that is away comes back."""
        return True


class DamagedError(StorageError):
    """What is stored is not what was written."""

    @property
    def may_pass(self) -> bool:
        """It is no better the next time."""
        return False


class NodeError(StorageError):
    """A folder on a node's own disk cannot be written, so no slide can be worked on there."""


class SlideError(PipelineError):
    """One slide cannot be used. `reason` is the short category that reports and ledgers count by."""

    left: str | None = None
    """Key of the slide in the store, where files of it were written before it was given up."""
    picture: bytes | None = None
    """The slide in small, a JPEG, where it was seen before it was given up."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)

    @property
    def may_pass(self) -> bool:
        """Where the way to the slide broke, or the node's room for copies of slides; not where the slide is wrong."""
        return self.reason in {"source", "cache"}

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.reason, str(self))


class BadTileError(SlideError):
    """One tile of a slide cannot be decoded."""


class PlanError(SlideError):
    """A slide's plan names a patch that cannot be decoded. `key` is the slide's in the store of plans."""

    def __init__(self, key: str, message: str) -> None:
        self.key = key
        super().__init__("bad-tiles", message)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.key, str(self))


class DataBudgetError(PipelineError):
    """More of the data is bad than the config allows."""

    exit_code = 3


class ReleaseError(PipelineError):
    """A model cannot become champion: another one is than it was compared with, or its decision does not allow it."""

    exit_code = 4


class ResourceError(PipelineError):
    """The cluster can never give what was asked for, or does not answer."""

    exit_code = 5


class TrackingError(PipelineError):
    """MLflow cannot be reached, or refuses."""

    @property
    def may_pass(self) -> bool:
        """A server that is away comes back."""
        return True


class StageError(PipelineError):
    """A stage cannot run."""


class Interrupted(PipelineError):
    """SIGINT or SIGTERM arrived; committed work is kept and the next run goes on from it."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        self.exit_code = 128 + signum
        super().__init__(f"interrupted by {signal.Signals(signum).name}; run the same command to go on")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.signum,)
