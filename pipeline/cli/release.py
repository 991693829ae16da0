"""The commands of the release: train again, judge again, and who is champion."""

from __future__ import annotations

import getpass
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from pipeline.cli.console import Chosen, JsonOption, errors, print_json, print_table, with_config

ForceOption = Annotated[
    str | None, typer.Option("--force", metavar="REASON", help="Promote what would be held; the reason is kept.")
]
ByOption = Annotated[str | None, typer.Option("--by", help="Who decides. Default: the user who is logged in.")]
release = typer.Typer(no_args_is_help=True, help="Who is champion, and back again.")


@with_config
def retrain(chosen: Chosen, force: ForceOption = None) -> None:
    """Train again where the cohort changed; the gate decides whether the model becomes champion.

    Exit 0 promoted or nothing to do, 4 held or rejected, 6 expected slides did not come.
    """
    from pipeline.release.retrain import retrain as retrain_cohort

    result = retrain_cohort(chosen.load(), force)
    if chosen.as_json:
        print_json(result.plain())
    else:
        print(f"{result.outcome}: {'; '.join(result.why)}")
        for name, place in (result.facts.get("pages") or {}).items():
            print(f"{name}: {place}")
    if result.exit_code:
        raise typer.Exit(result.exit_code)


def gate(
    replay: Annotated[str, typer.Option(help="decision.json of a retraining; its evidence.json lies beside it.")],
    as_json: JsonOption = False,
) -> None:
    """Take a decision again by the evidence it was taken by, and print it: exit 1 where the bytes differ."""
    with errors(as_json=as_json):
        from pipeline.gate.decision import replay as take_again

        data, difference = take_again(replay)
        sys.stdout.write(data.decode())
        sys.stdout.flush()
        if difference is not None:
            print(f"error: {replay} says something else than its evidence: {difference}", file=sys.stderr)
            raise typer.Exit(1)


@with_config
def promote(
    chosen: Chosen,
    approve: Annotated[str, typer.Option(help="The version in the registry that is to be champion.")],
    force: ForceOption = None,
    by: ByOption = None,
) -> None:
    """Make a version champion that waits for a person (`release status` says which)."""
    from pipeline.release.promotion import approve as approve_version

    _print(chosen, asdict(approve_version(chosen.load(), approve, by or getpass.getuser(), force)))


@release.command("rollback")
@with_config
def rollback(
    chosen: Chosen,
    reason: Annotated[str, typer.Option(help="Why; it is kept.")],
    by: ByOption = None,
) -> None:
    """Make the previous champion champion again."""
    from pipeline.release.promotion import rollback as roll_back

    _print(chosen, asdict(roll_back(chosen.load(), by or getpass.getuser(), reason)))


@release.command("status")
@with_config
def status(chosen: Chosen) -> None:
    """Say who is champion, why, since when, and what waits for a person. Exit 4 where the registry says otherwise."""
    from pipeline.release.standing import status as find_status

    found = find_status(chosen.load())
    _print(chosen, found)
    if not found["agrees"]:
        raise typer.Exit(4)


@release.command("repair")
@with_config
def repair(chosen: Chosen) -> None:
    """Bring the registry's aliases to what was last decided, as after a crash."""
    from pipeline.release.promotion import repair as repair_aliases

    _print(chosen, asdict(repair_aliases(chosen.load())))


def _print(chosen: Chosen, facts: dict[str, object]) -> None:
    if chosen.as_json:
        print_json(facts)
        return
    rows = [(name, _text(value)) for name, value in facts.items() if name != "last"]
    print_table(("", ""), rows)


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return "; ".join(map(str, value))
    return "nobody" if value is None else str(value)
