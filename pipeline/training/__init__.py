"""Learning: who trains on which slides when, the loop, its checkpoints, and Ray Train around it.

Committed or streamed slides come in; a checkpoint and metrics come out. The loop knows neither Ray nor MLflow
(`worker`, `restarts` and `driver` do), and the room does not know what is done with the model afterwards.
"""
