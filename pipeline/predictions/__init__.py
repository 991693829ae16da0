"""Slides to a folder that people look at: tables, and of each slide its maps, pictures and outlines.

Each slide's folder is committed on its own, so a killed batch goes on; what slides share, as the ends of colour scales,
is known once all are there, and drawn then. What reads the folder knows it by its files alone.
"""
