"""The tile stage on Ray Data: a cohort's slides to committed slides of a patch store.

Slides come in, and the status of each comes out. What a patch is and how it is kept is known below; torch and MLflow
are not known here.
"""
