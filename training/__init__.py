"""What the training loop calls: ranks, schedule, optimiser, precision, metrics, checkpoints, the run folder, the meter."""
