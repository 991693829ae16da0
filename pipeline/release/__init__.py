"""Training again when slides come, and which model is champion: one, whatever happens.

A config comes in; a decision with all its figures, and the registry's aliases as it says, come out. What a stage does
and how a network learns it must not know: it asks `workflow` for stages, and judges what they leave.
"""
