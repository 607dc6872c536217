"""Values of a user's program as bounded, private text."""
