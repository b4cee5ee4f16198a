"""How fast a model runs, and what such a figure must be read beside."""

from nybble.bench.speculation import PLAIN, Question, measure_drafts, read_questions
from nybble.bench.speed import SpeedTest, add_bandwidth, bandwidth, combinations, measure

__all__ = [
    "PLAIN",
    "Question",
    "SpeedTest",
    "add_bandwidth",
    "bandwidth",
    "combinations",
    "measure",
    "measure_drafts",
    "read_questions",
]
