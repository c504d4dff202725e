"""Training over a model: data, step, loop, checkpoints."""
