"""Fixtures of all tests."""

import pytest

from tiny import write_llama, write_tokenizer


@pytest.fixture(autouse=True)
def _own_times(tmp_path_factory, monkeypatch):
    """What a pass costs is kept for later processes, but not from one test to another."""
    from nybble.speculate import times

    folder = tmp_path_factory.mktemp("times")
    monkeypatch.setattr(times, "_folder", lambda: folder)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A random Llama folder with a byte-level tokenizer and a chat template; do not change it."""
    folder = write_llama(tmp_path_factory.mktemp("tiny") / "llama")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    """The model of `tiny_folder`, loaded."""
    import nybble

    return nybble.load(tiny_folder, threads=2)


@pytest.fixture(scope="module")
def one_thread():
    """Torch with one thread: of many small operations more threads only wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
