"""A store opened for reading, by whoever works with it: NumPy, PyTorch, Ray Data, Arrow.

It reads what is committed and changes nothing. torch and Ray are loaded only by whoever asks for their datasets. It
must not know a config, nor what the pipeline itself reads for training.
"""
