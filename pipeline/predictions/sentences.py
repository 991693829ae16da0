"""What a person should know of a slide's map, in words: how much of it is shown, and what the outputs owe to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config.recipe import Config
from pipeline.inference.explain import Explanation

_SHARE = 0.1  # of the patches, that are left out in the sentence on deletion


def sentences(
    config: Config, patches: int, selected: int, share: float, explanation: Explanation | None, models: int = 1
) -> list[str]:
    """Of one slide.

    Args:
        config: of the model.
        patches: N.
        selected: patches that were selected.
        share: of the attention, that these have.
        explanation: of the slide.
        models: whose mean is given, each of which selected for itself.
    """
    selecting = config.model.select
    if models > 1:
        pooled = "all patches" if selecting.context == "all" else "the patches that it selected"
        return [
            f"{_percent(share)} of the attention, which is the mean of {models} models, is in the {selected:,} of "
            f"{patches:,} patches that one of them selected.",
            f"The outputs are the mean of these models, each pooled over {pooled}; their spread is the least and the "
            "most that one of them gives, which is no confidence interval.",
            "An ensemble has no effect of patches; predict one of its models for that.",
        ]
    told = [f"{_percent(share)} of the attention is in the {selected:,} selected of {patches:,} patches."]
    if selecting.context == "all":
        told.append("The outputs are pooled over all patches.")
    elif selected < patches:
        told.append("The outputs are those of the selected patches alone; what the others hold did not enter.")
    if explanation is None:
        told.append("This model's pool does not tell what each patch does, so there is no effect of patches.")
        return told
    return [*told, *_deletion(config, explanation.curves)]


def outputs_line(values: Mapping[str, float], columns: Sequence[str]) -> str:
    """The outputs, in the order of `columns`."""
    return ", ".join(f"{column} {values[column]:.3f}" for column in columns)


def of_one(whole: str, slides: int, share: float, selected: int, among: int) -> str:
    """Of one of the slides of a bag.

    Args:
        whole: what they are of, patient or specimen.
        slides: of it.
        share: of the attention over all of them, that is on this one.
        selected: patches of this one.
        among: patches that were selected of all.
    """
    return (
        f"{_percent(share)} of the attention over the {whole}'s {slides:,} slides is on this one, which has "
        f"{selected:,} of the {among:,} selected patches."
    )


def _deletion(config: Config, curves: Any) -> list[str]:
    """Of the first task's likeliest output."""
    columns = config.tasks[0].output_columns
    column = max(columns, key=lambda name: curves["attention"]["deletion"][name][0])
    shares = curves["fraction"][1:-1]
    if not shares:
        return []
    place = 1 + min(range(len(shares)), key=lambda n: abs(shares[n] - _SHARE))
    before, *after = (curves[order]["deletion"][column][k] for order, k in (
        ("attention", 0), ("attention", place), ("effect", place), ("random", place)
    ))  # fmt: skip
    return [
        f"{column} is {before:.3f}; without {_percent(curves['fraction'][place])} of the pooled patches it is "
        f"{after[0]:.3f} where the most attended go, {after[1]:.3f} where those of the largest effect go, and "
        f"{after[2]:.3f} where they are drawn."
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"
