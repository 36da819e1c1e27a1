"""Selection over several processes; parameters may be sharded by FSDP2's ``fully_shard``, or by tensor parallelism."""

from .planner import RankBytes, bytes_per_rank
from .selector import DistributedFilterThenWeight

__all__ = ["DistributedFilterThenWeight", "RankBytes", "bytes_per_rank"]
