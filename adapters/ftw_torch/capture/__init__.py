"""Capture: one forward and one backward to activations, and the per-sample gradient factors that they show."""
