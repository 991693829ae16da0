"""One open slide, whichever library reads it, and what slide it is by content.

A file here or on S3 comes in; levels, pixels of a box and compressed tiles come out. OpenSlide, tifffile and
imagecodecs are known here and in `formats` alone, but for the PNGs that `inference/figures` writes; it must not know
what a patch is.
"""
