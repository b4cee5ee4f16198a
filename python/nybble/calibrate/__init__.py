"""Calibration: what a model's layers see when it reads a text, or an encoder's of images.

:func:`nybble.calibrate.text.draw` chooses the text and :func:`nybble.calibrate.images.draw` the
images, :class:`~nybble.calibrate.layers.Walk` runs the model one layer at a time, and
:class:`~nybble.calibrate.stats.InputStats` sums up what it sees.
Nothing here knows what the statistics are for.
"""
