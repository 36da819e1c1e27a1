"""The demo: ``python -m ftw_torch.demo``."""
