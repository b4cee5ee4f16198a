"""Models' folders opened as calibration opens them."""

import json

from nybble import _nybble
from nybble.calibrate.layers import Walk


def walk_of(folder):
    """Open a model's folder for a walk."""
    checkpoint = _nybble.Checkpoint.open(str(folder))
    shapes = {name: shape for name, (_, shape) in checkpoint.tensors().items()}
    config, plan = json.loads(checkpoint.config()), json.loads(checkpoint.plan())
    return Walk(config, plan, shapes, checkpoint.read)
