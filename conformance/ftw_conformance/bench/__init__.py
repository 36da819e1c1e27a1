"""``python -m ftw_conformance bench qp | torch | jax``: time and memory beside peers and plain steps."""
