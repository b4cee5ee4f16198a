"""How fast a model runs, and what such a figure must be read beside."""

from nybble.bench.speed import SpeedTest, bandwidth, measure, tests

__all__ = ["SpeedTest", "bandwidth", "measure", "tests"]
