"""What both trainings share: the loop, processes, checkpoints, metrics."""
