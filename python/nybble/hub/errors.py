"""What can go wrong while a model is fetched."""

from nybble.errors import NybbleError


class PullError(NybbleError):
    """A model could not be fetched, or what arrived is not what was asked for."""


class HubUnreachableError(PullError):
    """The Hugging Face hub did not answer, or may not be asked: another source may still work."""
