"""JAX adapter of Filter-then-Weight."""
