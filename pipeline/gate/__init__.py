"""The gate: whether a model may become champion, as a pure function of what is known of it.

In: predictions of two models on one test, and rules. Out: a decision whose bytes anyone can compute again. It must not
know where models, slides or decisions are kept, nor who is champion: neither torch nor Ray nor MLflow is loaded.
"""
