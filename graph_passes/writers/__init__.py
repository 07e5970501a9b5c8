"""Emit one form of a ``MoEBlock``."""
