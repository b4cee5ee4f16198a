"""How good a model still is: perplexity on a text."""

from nybble.eval.perplexity import Perplexity, perplexity
from nybble.eval.text import read_text

__all__ = ["Perplexity", "perplexity", "read_text"]
