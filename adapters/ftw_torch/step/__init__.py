"""One step: the target pass, the pool pass, the inner products of a choice, and the audit of the first use."""
