"""Blocks under calibration: the streamed, suspended model is the model; what is gathered is what its layers are given.

Faults put in by hand, each caught: second moments divided by the judging rows too; a trial of another batch; weights that share an input told
by its shape alone; what is put not written into the module; a forward that goes on while its tensors are parked (the process dies); a trial that
runs on the input itself; the halves of an expert's fused tensor exchanged.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from any_architecture import ARCHITECTURES, calibration, save_architecture
from torch import Tensor

from lighten.compress.activations import SpillBuffer
from lighten.compress.block import Block
from lighten.compress.checkpoint import Checkpoint
from lighten.compress.skeleton import Skeleton, Unit
from lighten.compress.suspend import Forwards
from lighten.compress.walk import inputs_of
from lighten.errors import ModelError
from lighten.model.read import read_config

Folders = dict[str, Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("architectures")
    return {name: save_architecture(name, root / name) for name in ARCHITECTURES}


def skeleton_of(folder: Path) -> Skeleton:
    checkpoint = Checkpoint(folder)
    return Skeleton(read_config(folder), {name: tuple(checkpoint.spec(name).shape) for name in checkpoint.names}, dtype=torch.float32)


def batches_of(name: str, skeleton: Skeleton, count: int = 3) -> list[dict[str, Any]]:
    batch = calibration(name)(0)[0]
    rows = [{key: torch.from_numpy(value[row * 2 : row * 2 + 2]) for key, value in batch.items()} for row in range(count)]
    return [inputs_of(skeleton.module, row) for row in rows]


def truth(name: str, folder: Path) -> Any:
    import transformers

    return getattr(transformers, ARCHITECTURES[name][1]).from_pretrained(folder, attn_implementation="eager").eval()


def first_output(found: Any) -> Tensor:
    value = found[0] if not hasattr(found, "logits") else found.logits
    assert isinstance(value, Tensor)
    return value


@contextmanager
def suspended(
    name: str, folder: Path, *, limit_bytes: int | None = None, count: int = 3
) -> Iterator[tuple[Skeleton, Forwards, Checkpoint, list[Tensor]]]:
    """The forwards of an architecture before their first unit, and a list that takes their outputs."""
    skeleton, checkpoint = skeleton_of(folder), Checkpoint(folder)
    for module in skeleton.outside():
        skeleton.load_own(module, checkpoint.__getitem__)
    outputs: list[Tensor] = []
    skeleton.module.register_forward_hook(lambda module, args, output: outputs.append(first_output(output)))
    with tempfile.TemporaryDirectory() as work, SpillBuffer(Path(work), limit_bytes=limit_bytes) as buffer:
        forwards = Forwards(module=skeleton.module, units=skeleton.units, batches=batches_of(name, skeleton, count), buffer=buffer)
        with forwards.running():
            yield skeleton, forwards, checkpoint, outputs


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_tensor_of_the_checkpoint_has_a_place(folders: Folders, name: str) -> None:
    skeleton = skeleton_of(folders[name])
    wanted = truth(name, folders[name]).state_dict()
    for module in [unit.module for unit in skeleton.units] + list(skeleton.outside()):
        skeleton.load(module, Checkpoint(folders[name]).__getitem__)
    for key, value in skeleton.module.state_dict().items():
        assert torch.equal(value, wanted[key]), key
    for key, buffer in truth(name, folders[name]).named_buffers():
        assert torch.equal(skeleton.module.get_buffer(key), buffer), key


@pytest.mark.parametrize("limit_bytes", [None, 0], ids=["in memory", "in a file"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_forwards_that_wait_at_every_unit_end_where_plain_ones_do(folders: Folders, name: str, limit_bytes: int | None) -> None:
    model = truth(name, folders[name])
    with suspended(name, folders[name], limit_bytes=limit_bytes) as (skeleton, forwards, checkpoint, outputs), torch.no_grad():
        met = []
        while (unit := forwards.at) is not None:
            met.append(unit.name)
            skeleton.load(unit.module, checkpoint.__getitem__)
            forwards.trial(1)  # a run that is thrown away changes nothing
            forwards.go_on()
            skeleton.drop(unit.module)
        wanted = [first_output(model(**batch)) for batch in batches_of(name, skeleton)]
        for found, exact in zip(outputs, wanted, strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
    assert len(met) >= 2
    blocks = [unit.module for unit in skeleton.units if list(unit.module.children())]  # a head may share its weight with the embedding
    assert all(parameter.is_meta for block in blocks for parameter in block.parameters())


def test_second_moments_are_those_of_the_layers_inputs(folders: Folders) -> None:
    folder = folders["llama"]
    seen: dict[str, list[Tensor]] = {}
    model = truth("llama", folder)
    for key, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda module, args, key=key: seen.setdefault(f"{key}.weight", []).append(args[0]))
    with suspended("llama", folder) as (skeleton, forwards, checkpoint, _), torch.no_grad():
        for batch in batches_of("llama", skeleton):
            model(**batch)
        for _ in range(2):
            assert forwards.at is not None
            unit = forwards.at
            skeleton.load(unit.module, checkpoint.__getitem__)
            names = frozenset(name for name in skeleton.names_in(unit.module) if name.endswith("proj.weight"))
            block = Block(
                unit=unit, skeleton=skeleton, forwards=forwards, source=checkpoint.__getitem__, wanted=names, transposed=frozenset(),
                held_out=[False, False, True],
            )  # fmt: skip
            levels = block.levels()
            assert [len(subset.names) for level in levels for subset in level] == [3, 1, 2, 1]  # q k v, o, gate up, down
            for level in levels:
                for subset, statistics in block.statistics(level):
                    for name in subset.names:
                        rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen[name][:2]])
                        held = seen[name][2].reshape(-1, rows.shape[1])
                        torch.testing.assert_close(statistics.hessian, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
                        torch.testing.assert_close(statistics.held_out, held.T @ held / len(held), rtol=1e-4, atol=1e-5)
                        torch.testing.assert_close(statistics.mean_abs, rows.abs().mean(0), rtol=1e-4, atol=1e-5)
                        torch.testing.assert_close(statistics.abs_max, rows.abs().amax(0), rtol=1e-4, atol=1e-5)
                        assert (statistics.rows, statistics.held_out_rows) == (len(rows), len(held))
            forwards.go_on()
            skeleton.drop(unit.module)


def test_in_turn_a_unit_runs_once_and_each_input_is_that_of_the_weights_put_before(folders: Folders) -> None:
    found: dict[bool, list[Tensor]] = {}
    for at_once in (True, False):
        with suspended("llama", folders["llama"]) as (skeleton, forwards, checkpoint, _):
            unit = forwards.at
            assert unit is not None
            calls: list[int] = []
            unit.module.mlp.register_forward_pre_hook(lambda module, args, calls=calls: calls.append(1))
            skeleton.load(unit.module, checkpoint.__getitem__)
            names = frozenset(name for name in skeleton.names_in(unit.module) if name.endswith("proj.weight"))
            block = Block(
                unit=unit, skeleton=skeleton, forwards=forwards, source=checkpoint.__getitem__, wanted=names, transposed=frozenset(),
                held_out=[False, False, True], at_once=at_once,
            )  # fmt: skip
            found[at_once] = []
            for subset, statistics in block.in_turn():
                found[at_once].append(statistics.hessian)
                for name in subset.names:
                    block.put(name, block.tensor(name) * 0.5)
            assert block.gone_on is at_once
            assert forwards.at is not None
            assert (forwards.at.name != unit.name) is at_once
            assert len(calls) == (4 if at_once else 1 + 3 * 2)  # what is met where is found by one more; the mlp runs for its two inputs
    assert [one.equal(two) for one, two in zip(found[True], found[False], strict=True)] == [True] * 4


def test_an_expert_is_given_the_rows_that_are_routed_to_it(folders: Folders) -> None:
    with suspended("mixtral", folders["mixtral"]) as (skeleton, forwards, checkpoint, _):
        assert forwards.at is not None
        unit = forwards.at
        skeleton.load(unit.module, checkpoint.__getitem__)
        names = frozenset(name for name in skeleton.names_in(unit.module) if ".experts." in name)
        block = Block(
            unit=unit, skeleton=skeleton, forwards=forwards, source=checkpoint.__getitem__, wanted=names, transposed=frozenset(),
            held_out=[False] * 3,
        )  # fmt: skip
        levels = block.levels()
        assert {name for level in levels for subset in level for name in subset.names} == names
        assert [len(level) for level in levels] == [4, 4]  # what goes into gate and up of each expert, then into its down
        rows = [statistics.rows for _, statistics in block.statistics(levels[0])]
        assert sum(rows) == 3 * 2 * 16 * 2  # batches, sequences, tokens, experts per token
        assert rows == [statistics.rows for _, statistics in block.statistics(levels[1])]


def test_a_trial_leaves_the_input_of_a_unit_that_writes_into_it() -> None:
    class Adding(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.add_(1)

    module = torch.nn.ModuleDict({"unit": Adding()})
    module.forward = lambda x: module["unit"](x)  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as work, SpillBuffer(Path(work), limit_bytes=None) as buffer:
        units = [Unit(name="unit", module=module["unit"])]
        forwards = Forwards(module=module, units=units, batches=[{"x": torch.zeros(2, 3)}], buffer=buffer)
        with forwards.running():
            assert [float(forwards.trial(0).sum()) for _ in range(2)] == [6.0, 6.0]


class Choosy(torch.nn.Module):
    """Goes through what a text's first value says: weights inside of `unit`, or the block `other` besides."""

    def __init__(self, choose: str) -> None:
        super().__init__()
        self.choose, self.meet = choose, lambda x, names: None
        self.other = torch.nn.Identity()
        inner = self

        class Unit(torch.nn.Identity):
            def forward(self, x: Tensor) -> Tensor:
                if inner.choose == "weights" and x.flatten()[0] > 0:
                    inner.meet(x, ["a"])
                return x

        self.unit = Unit()

    def forward(self, x: Tensor) -> Tensor:
        x = self.unit(x)
        return self.other(x) if self.choose == "blocks" and float(x.flatten()[0]) > 0 else x


@pytest.mark.parametrize(
    ("choose", "said"),
    [("weights", r"one met a, another none\. Such a model cannot"), ("blocks", r"some have come to its end and some to other\. Such a model cannot")],
)
@pytest.mark.parametrize("first", [0.0, 1.0])
def test_a_model_that_chooses_by_its_text_is_refused_in_words(choose: str, said: str, first: float) -> None:
    module = Choosy(choose)

    @contextmanager
    def watch(meet: Any) -> Iterator[None]:
        module.meet = meet
        yield

    with tempfile.TemporaryDirectory() as work, SpillBuffer(Path(work), limit_bytes=None) as buffer:
        units = [Unit(name="unit", module=module.unit), Unit(name="other", module=module.other)]
        batches = [{"x": torch.full((2, 3), value)} for value in (first, 1 - first)]
        forwards = Forwards(module=module, units=units, batches=batches, buffer=buffer)
        with forwards.running(), pytest.raises(ModelError, match=said):
            for _ in forwards.go_on_by_products(watch, lambda name: True):
                pass


def test_a_block_runs_on_with_what_was_put(folders: Folders) -> None:
    with suspended("gpt2", folders["gpt2"]) as (skeleton, forwards, checkpoint, _):
        assert forwards.at is not None
        unit = forwards.at
        skeleton.load(unit.module, checkpoint.__getitem__)
        name = next(name for name in skeleton.names_in(unit.module) if name.endswith("c_attn.weight"))
        block = Block(
            unit=unit, skeleton=skeleton, forwards=forwards, source=checkpoint.__getitem__, wanted=frozenset({name}), transposed=frozenset({name}),
            held_out=[False] * 3,
        )  # fmt: skip
        before = [first_output(found) for found in block.outputs()]
        matrix = block.weight(name)
        assert matrix.shape == (192, 64)  # Conv1D stores the transpose
        block.put(name, 2 * block.tensor(name))
        assert torch.equal(block.weight(name), 2 * matrix)
        after = [first_output(found) for found in block.outputs()]
        assert all(not torch.allclose(old, new) for old, new in zip(before, after, strict=True))
