"""A pass over the blocks that changes nothing: what each is given and gives is looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lighten.compress.activations import SpillBuffer
from lighten.compress.block import Block
from lighten.compress.memory_plan import release_free
from lighten.compress.reports import weights_of
from lighten.compress.skeleton import Skeleton
from lighten.compress.suspend import Forwards
from lighten.compress.walk import HELD_OUT, Job, inputs_of
from lighten.model.spec import Linear


def look_at_blocks(job: Job, names: frozenset[str], *, prepare: Callable[[Skeleton], None] = lambda skeleton: None) -> Iterator[Block]:
    """Each unit that a forward comes to, in forward order, with its weights loaded; when the next is asked for, all forwards go through it.

    Args:
        names: the weights whose inputs are of interest, of whatever unit.
        prepare: is given the module before any forward begins.
    """
    skeleton = job.skeleton()
    prepare(skeleton)
    for module in skeleton.outside():
        skeleton.load_own(module, job.value)
    batches = [inputs_of(skeleton.module, batch) for batch in job.run.batches(job.step["tokens"])]
    held_out = [len(batches) > 1 and index % HELD_OUT == min(HELD_OUT, len(batches)) - 1 for index in range(len(batches))]
    experts = {name for part in job.before.parts if isinstance(part, Linear) and part.experts > 1 for name in weights_of(part)}
    with SpillBuffer(job.run.journal.scratch, limit_bytes=job.run.buffer_bytes) as buffer:
        forwards = Forwards(module=skeleton.module, units=skeleton.units, batches=batches, buffer=buffer)
        with forwards.running():
            while (unit := forwards.at) is not None:
                skeleton.load(unit.module, job.value)
                wanted = names & frozenset(skeleton.names_in(unit.module))
                yield Block(
                    unit=unit, skeleton=skeleton, forwards=forwards, source=job.value, wanted=wanted, transposed=job.transposed, held_out=held_out,
                    routed=not experts.isdisjoint(wanted),
                )  # fmt: skip
                forwards.go_on()
                skeleton.drop(unit.module)
                release_free()
