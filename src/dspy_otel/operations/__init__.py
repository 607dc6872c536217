"""What each DSPy thing is called and what it tells: one file each, with pure functions beside a thin operation."""
