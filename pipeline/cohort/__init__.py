"""Which slides there are, whose they are, their labels, and which train and which test.

A CSV or Parquet file comes in; checked rows and splits by patient come out, or all of the file's problems at once. It
must not open a slide.
"""
