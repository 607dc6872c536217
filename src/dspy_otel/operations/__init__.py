"""Operations of DSPy: one file for each, with a thin wrapper of its entry points beside pure functions."""
