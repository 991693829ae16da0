"""What comes after training: the test, predictions, reports, the quality page, other tools' files, the served model.

A trained model or a tiled cohort comes in; tables, pictures and pages come out. It must not know how the model was
trained.
"""
