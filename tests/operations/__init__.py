"""Each DSPy operation, watched whole: snapshots of every exported span."""
