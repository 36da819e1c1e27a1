"""Optimizers: from the state of torch.optim and of other packages to the geometry of the next step."""
