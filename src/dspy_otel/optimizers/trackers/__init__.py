"""One small file for each optimizer that needs hooks of its own."""
