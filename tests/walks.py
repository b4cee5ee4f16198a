"""Models' folders opened as calibration opens them, and layers that are run."""

import json

import numpy as np
import torch

from nybble import _nybble
from nybble.calibrate.layers import Walk


def walk_of(folder):
    """Open a model's folder for a walk."""
    checkpoint = _nybble.Checkpoint.open(str(folder))
    shapes = {name: shape for name, (_, shape) in checkpoint.tensors().items()}
    config, plan = json.loads(checkpoint.config()), json.loads(checkpoint.plan())
    return Walk(config, plan, shapes, checkpoint.read)


def run_both_ways(layer, plain, staged):
    """Run a layer at once and stage by stage, which must be shown the same inputs."""
    traced = {}
    for window, inputs, output in layer.trace(plain):
        traced[window], plain[window] = inputs, output
    for stage in range(4):
        for window, inputs in layer.inputs(stage, staged):
            np.testing.assert_allclose(inputs, traced[window][stage], rtol=1e-4, atol=1e-4)
    layer.outputs(staged)


def output_of(module, run):
    """What a module gives while something runs that calls it once."""
    caught = []

    def keep(module, args, output):
        caught.append(output[0] if isinstance(output, tuple) else output)

    hook = module.register_forward_hook(keep)
    with torch.no_grad():
        run()
    hook.remove()
    return caught[0]
