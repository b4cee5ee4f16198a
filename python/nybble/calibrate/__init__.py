"""Calibration: what a model's layers see when it reads a text.

:func:`~nybble.calibrate.text.draw` chooses the text, :class:`~nybble.calibrate.layers.Walk` runs
the model one layer at a time, :class:`~nybble.calibrate.stats.InputStats` sums up what it sees.
Nothing here knows what the statistics are for.
"""
