"""The reference implementation of Filter-then-Weight: plain NumPy loops, compiled by numba where it is installed."""
