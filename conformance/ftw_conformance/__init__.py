"""Conformance of Filter-then-Weight backends against the reference."""
