"""PyTorch adapter of Filter-then-Weight."""
