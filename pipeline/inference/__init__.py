"""From a bag or a slide to a prediction, its attention, its metrics and its figures.

Shared by validation, the test, `predict` and serving, so that one slide has one answer. It must not know who asks.
"""
