"""Tiny random models of every family."""
