"""From the config to `ips` objects, and a model or a training state as a folder.

The only bridge between the two: `ips` never sees a config, and whoever trains names no encoder, aggregator or head.
"""
