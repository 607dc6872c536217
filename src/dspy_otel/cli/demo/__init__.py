"""`dspy-otel demo`: a program, an evaluation and two optimizers, watched, without a key and without a network."""
