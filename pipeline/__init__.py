"""From slides in a bucket to a registered model that predicts. Rooms on floors: pipeline/README.md."""
