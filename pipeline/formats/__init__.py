"""What files say at the level of their bytes: JPEG segments, damage, OME-XML, channels, DICOM, HDF5 and tensors.

Bytes or text come in; typed facts come out, or what is wrong with them. Nothing is opened here, and it must not know
what a slide or a level is.
"""
