"""Looking at slides in a browser: the picture at full resolution, and over it what a model saw.

Serves what `predict` wrote, or what a patch store holds; reads slides where they lie and writes nothing. What a
client may name are numbers of a table that the server made: it knows no path and no URI.
"""
