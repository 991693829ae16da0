"""The pipeline from a notebook or a program: the same work as the commands, results as objects that can be looked at.

No exit codes, no logging set up, no signals taken: errors are raised, and everything else is returned. It must not know
the command line.
"""
