"""``python -m ftw_conformance bench qp | torch | forward | jax``: time and memory beside peers and plain steps."""
