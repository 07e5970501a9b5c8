"""Experts that no input can choose, and why: found without a plan, and deleted like those that a plan drops."""

from graph_passes.unreachable.find import Findings, Unreachable, find_unreachable, summarise

__all__ = ["Findings", "Unreachable", "find_unreachable", "summarise"]
