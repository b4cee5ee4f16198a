"""The same work through nybble and through other CPU engines, side by side.

A figure of one engine says little: machines differ, and on a shared one the memory moves by a
factor of two between minutes. So every engine gets the same tokens and threads and takes its turns
in the same rounds (round 2 of anyone comes after round 1 of everyone), in a process of its own,
with a reading of the memory's bandwidth, and of what other processes did, beside every turn.

    python -m benches.peers                    # SmolLM2-135M, every engine that is installed
    python -m benches.peers --model tinyllama  # the shape of a larger model, random weights
    python -m benches.peers --quick            # a model of nothing, once: does all still run?

``shapes`` makes the models, ``engines`` has one file an engine, ``worker`` is the process that
runs one of them, ``rounds`` starts the workers and takes the times, ``record`` and ``plot`` write
them down. ``pip install .[bench]`` brings the engines; what is missing is left out with a line.
"""
