"""How a workload is spread over devices, as data."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

from lighten.errors import WorkloadError

Shard = Literal["none", "zero1", "zero2", "zero3"]
Schedule = Literal["1f1b", "interleaved", "gpipe"]
Offload = Literal["none", "optimizer"]
SHARDS, SCHEDULES, OFFLOADS = get_args(Shard), get_args(Schedule), get_args(Offload)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A grid of devices: tensor × context × pipeline × data, innermost first, as Megatron-LM orders ranks.

    `Workload.batch_size` is the global batch: dp · micro_batch_size · accumulation sequences a step.

    Attributes:
        dp, tp, pp, cp: sizes of data, tensor, pipeline and context parallelism; their product is the number of devices.
        ep: expert parallelism: each expert group takes ep of the dp · cp ranks; it divides that.
        shard: what data-parallel ranks share out: nothing; the optimizer's state (ZeRO-1, Megatron's distributed optimizer); gradients too
            (ZeRO-2); weights too (ZeRO-3, FSDP). Source: Rajbhandari et al. 2019 (arXiv:1910.02054).
        shard_group: ranks that one copy is shared out over, the rest hold copies (HSDP); None: all of dp · cp.
        sequence_parallel: norms and dropouts between tensor-parallel regions are split over positions (arXiv:2205.05198).
        schedule: order of a pipeline's micro-batches; interleaved has `virtual_stages` > 1 pieces a device (arXiv:2104.04473).
        micro_batch_size: sequences in one forward pass of one data-parallel rank; None: all of the rank's share at once.
        offload: what lies in the host's memory.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    shard: Shard = "none"
    shard_group: int | None = None
    sequence_parallel: bool = False
    schedule: Schedule = "1f1b"
    virtual_stages: int = 1
    micro_batch_size: int | None = None
    offload: Offload = "none"

    def __post_init__(self) -> None:
        for name in ("dp", "tp", "pp", "cp", "ep", "virtual_stages", "micro_batch_size", "shard_group"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise WorkloadError(f"{name}={getattr(self, name)} is not positive.")
        for name, known in (("shard", SHARDS), ("schedule", SCHEDULES), ("offload", OFFLOADS)):
            if getattr(self, name) not in known:
                raise WorkloadError(f"{name}={getattr(self, name)!r} is not known; known: {', '.join(known)}.")
        if (self.dp * self.cp) % self.ep:
            raise WorkloadError(f"ep={self.ep} does not divide dp · cp = {self.dp * self.cp}: experts are spread over data-parallel ranks.")
        if self.shard_group is not None and (self.shard == "none" or (self.dp * self.cp) % self.shard_group):
            raise WorkloadError(f"shard_group={self.shard_group} needs --shard and has to divide dp · cp = {self.dp * self.cp}.")
        if (self.schedule == "interleaved") != (self.virtual_stages > 1):
            raise WorkloadError(f"schedule={self.schedule} with virtual_stages={self.virtual_stages}: interleaved has at least 2, others 1.")
        if self.virtual_stages > 1 and self.pp == 1:
            raise WorkloadError(f"virtual_stages={self.virtual_stages} has no effect with pp=1.")
        if self.sequence_parallel and self.tp == 1:
            raise WorkloadError("sequence_parallel has no effect with tp=1.")

    def __str__(self) -> str:
        """What differs from one device, such as dp=8 tp=4 shard=zero1."""
        given = (f"{each.name}={getattr(self, each.name)}" for each in fields(self) if getattr(self, each.name) != each.default)
        return " ".join(given) or "one device"

    @property
    def devices(self) -> int:
        return self.dp * self.tp * self.pp * self.cp

    @property
    def sharing_ranks(self) -> int:
        """Ranks that one copy of the shared-out state lies on."""
        return self.shard_group or self.dp * self.cp

    def micro_batch(self, batch_size: int) -> int:
        """Sequences of one forward pass of one rank.

        Raises:
            WorkloadError: the global batch does not divide.
        """
        if batch_size % self.dp:
            raise WorkloadError(f"batch_size={batch_size} does not divide over dp={self.dp} ranks; use a multiple of {self.dp}.")
        share = batch_size // self.dp
        micro = self.micro_batch_size or share
        if micro < 1 or share % micro:
            raise WorkloadError(f"micro_batch_size={micro} does not divide the {share} sequences of a rank (batch_size={batch_size}, dp={self.dp}).")
        return micro

    def micro_batches(self, batch_size: int) -> int:
        """Forward passes of one rank in a step.

        Raises:
            WorkloadError: the global batch does not divide.
        """
        return batch_size // self.dp // self.micro_batch(batch_size)
