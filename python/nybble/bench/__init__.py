"""How fast a model runs, and what such a figure must be read beside."""

from nybble.bench.speed import SpeedTest, add_bandwidth, bandwidth, combinations, measure

__all__ = ["SpeedTest", "add_bandwidth", "bandwidth", "combinations", "measure"]
