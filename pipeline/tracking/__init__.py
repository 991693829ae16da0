"""MLflow: runs by explicit id, and the model registry.

Metrics, artifacts and trained folders come in; runs and model versions come out. It must not know what a stage is.
"""
