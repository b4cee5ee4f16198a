"""Names of methods."""

import pytest

from nybble.errors import ArgumentError
from nybble.quant import METHODS, Quantizer, Rtn
from nybble.registry import Registry


def test_names_give_classes_and_unknown_ones_the_nearest():
    assert METHODS.lookup("rtn") is Rtn
    assert issubclass(METHODS["rtn"], Quantizer)
    assert list(METHODS) == ["rtn", "gptq"]
    with pytest.raises(ArgumentError, match="method 'rtm'; did you mean rtn"):
        METHODS.lookup("rtm")


def test_an_empty_table_says_so():
    with pytest.raises(ArgumentError, match="known: none"):
        Registry("thing").lookup("a")
