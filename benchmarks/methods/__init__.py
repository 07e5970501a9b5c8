"""What is left of a model when a share of its experts goes: every method that chooses them, on every task."""
