"""Tasks, one package per model: all of a model's training that the training loop does not know."""
