"""How good a model still is: perplexity, agreement with the original, accuracy on questions."""

from nybble.eval.agreement import Agreement, agreement
from nybble.eval.choices import Accuracy, accuracy
from nybble.eval.continuation import continuation
from nybble.eval.perplexity import Perplexity, perplexity
from nybble.eval.ppl_sparsity import PplSparsity, ppl_sparsity
from nybble.eval.tasks import TASKS
from nybble.eval.text import read_text

__all__ = [
    "TASKS",
    "Accuracy",
    "Agreement",
    "Perplexity",
    "PplSparsity",
    "accuracy",
    "agreement",
    "continuation",
    "perplexity",
    "ppl_sparsity",
    "read_text",
]
