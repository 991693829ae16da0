from __future__ import annotations

from pipeline.inference.explain import Explanation
from pipeline.predictions.sentences import sentences
from tests.pipeline.small import small_config

CURVES = {
    "fraction": [0.0, 0.05, 0.1, 0.5, 1.0],
    **{
        order: {"deletion": {"tumour_no": [0.2] * 4 + [None], "tumour_yes": [0.8, 0.7, value, 0.1, None]}}
        for order, value in (("attention", 0.5), ("effect", 0.25), ("random", 0.75))
    },
}


def test_what_a_map_shows_and_what_it_is_worth_in_words() -> None:
    assert sentences(small_config(), 1000, 64, 0.8312, Explanation({}, CURVES)) == [
        "83.1% of the attention is in the 64 selected of 1,000 patches.",
        "The outputs are those of the selected patches alone; what the others hold did not enter.",
        "tumour_yes is 0.800; without 10% of the pooled patches it is 0.500 where the most attended go, 0.250 where "
        "those of the largest effect go, and 0.750 where they are drawn.",
    ]


def test_a_pool_that_does_not_tell_is_said_to() -> None:
    said = sentences(small_config(), 5, 5, 1.0, None)
    assert said == [
        "100% of the attention is in the 5 selected of 5 patches.",
        "This model's pool does not tell what each patch does, so there is no effect of patches.",
    ]


def test_an_ensemble_says_what_its_spread_is() -> None:
    said = sentences(small_config(), 1000, 150, 0.9, None, models=5)
    assert said[0].startswith("90% of the attention, which is the mean of 5 models, is in the 150 of 1,000 patches")
    assert "no confidence interval" in said[1]
    assert "predict one of its models" in said[2]
