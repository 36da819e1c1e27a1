"""Selection over several processes; parameters may be sharded by FSDP2's ``fully_shard``."""

from .selector import DistributedFilterThenWeight

__all__ = ["DistributedFilterThenWeight"]
