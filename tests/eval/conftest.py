"""What the tests of evaluation share."""

import numpy as np
import pytest


class Broken:
    """A model, and its own session, whose logits are no numbers."""

    path = "broken"
    context = 512

    def __init__(self, like):
        self.tokenizer, self.info, self.vocab_size = like.tokenizer, like.info, like.vocab_size

    def session(self):
        return self

    def truncate(self, n):
        pass

    def rewind(self, prompt):
        return prompt

    def forward(self, ids, want, **_):
        rows = 1 if want == "last" else len(ids)
        return np.full((rows, self.vocab_size), np.nan, dtype=np.float32)


@pytest.fixture
def broken(tiny):
    return Broken(tiny)
