"""Evaluation sweeps: models x cohorts x settings from one reading of each slide, with statistics that hold.

A config comes in, rows of predictions, tables and a page go out. It must not know how models are trained or promoted,
and it never chooses: thresholds and checkpoints come with the models.
"""
