"""The ``nybble`` command: one file a verb.

Data goes to stdout, progress and notes to stderr; ``--json`` prints one JSON object on stdout and
nothing else. The exit code is 0 for success, 1 for a failure, 2 for a command line that makes no
sense, 130 after Ctrl-C and 141 when the reader of our output has gone.
"""
