"""Floor 3: the training step, the loop around it, checkpoints and the run folder."""
