"""Perplexity of every shipped recipe on real models, beside the paper's figures."""
