"""Records of per-sample gradients: joined, bucketed, and multiplied with each other."""
