"""Filter-then-Weight: online data selection and reweighting that matches the optimizer's real update."""

__version__ = "0.1.0"
