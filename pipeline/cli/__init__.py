"""The commands: what a person or a scheduler types.

Arguments come in; results go to stdout, messages to stderr, and the exit code says how it ended. It knows how things
are asked for and shown, never how they are done.
"""
