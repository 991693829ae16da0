"""What has to run, and why: the stages of a run, each named by the fingerprint of all that determines it.

A config comes in; finished stages with their records come out. Stages meet at committed artifacts only; this room
must not know how a slide is tiled or a network trained.
"""
