"""Lossless speculation: several tokens a pass, the same tokens as without.

The drafters are in the Rust core; here are their settings. See :class:`Drafts`.
"""

from nybble.speculate.datastore import build
from nybble.speculate.settings import SOURCES, Drafts, parse

__all__ = ["SOURCES", "Drafts", "build", "parse"]
