"""``python -m ftw_conformance bench qp | torch | gpu | forward | jax``: time and memory, and those of peers."""
