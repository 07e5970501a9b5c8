"""Calibrate, rank, plan and apply: from a checkpoint and task data to a smaller checkpoint."""
