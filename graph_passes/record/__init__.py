"""The record between readers and writers, and what a plan makes of it: experts go, become means, or are shared."""
