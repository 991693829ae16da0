"""One open slide, whichever library reads it, and what slide it is by content.

A file here or on S3 comes in; levels, pixels of a box and compressed tiles come out. The only room that knows
OpenSlide, tifffile and imagecodecs; it must not know what a patch is.
"""
