"""Optimizers: every ``compile`` becomes a span that knows its run."""
