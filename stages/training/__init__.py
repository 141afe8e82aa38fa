"""Shared by both trainings: loop, processes, checkpoints, metrics."""
