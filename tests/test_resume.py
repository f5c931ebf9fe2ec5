"""A run that is killed at any moment goes on where it was, and ends in the same bytes; what it was begun with is held to.

Faults that were put in by hand, each caught: a block file written in place instead of beside it; a checksum that leaves the header out; an
identity that is not compared on resume; the folder removed before the artifact has its name.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from lighten.compress import memory_plan, walk
from lighten.compress import run_identity as run_identity_module
from lighten.compress.ggml import GgmlTensor
from lighten.compress.grid import QuantizedTensor
from lighten.compress.journal import Journal, work_folder
from lighten.errors import OutputError
from lighten.formats import artifact as artifact_module
from lighten.formats.artifact import RUN, Work, write_artifact
from lighten.recipe import parse_recipe

IDENTITY = {"recipe": "quantize(gptq, bits=4) @ torch", "weights": "abc", "text": "def"}


def begin(folder: Path, *, resume: bool = False, **changes: str) -> Journal:
    return Journal.open(folder, IDENTITY | changes, resume=resume)


def bits_of(value: object) -> object:
    return (value.dtype, value.shape, value.contiguous().reshape(-1).view(torch.uint8).tolist()) if isinstance(value, torch.Tensor) else value


def same(left: object, right: object) -> bool:
    if isinstance(left, torch.Tensor):
        return bits_of(left) == bits_of(right)
    return type(left) is type(right) and all(bits_of(getattr(left, name)) == bits_of(getattr(right, name)) for name in left.__dataclass_fields__)


WEIGHTS = {
    "float32": torch.randn(5, 7), "bfloat16": torch.randn(3, 2).bfloat16(), "float8": torch.randn(9).to(torch.float8_e4m3fn),
    "scalar": torch.tensor(3),
    "empty": torch.empty(0, 4), "transposed": torch.randn(6, 10).T, "bool": torch.tensor([True, False]),
    "int": QuantizedTensor(
        codes=torch.randint(0, 16, (4, 8), dtype=torch.uint8), scale=torch.rand(4, 2).half(), zero_point=torch.ones(4, 2, dtype=torch.uint8), bits=4,
        group_size=4,
    ),
    "nvfp4": QuantizedTensor(
        codes=torch.randint(0, 16, (4, 16), dtype=torch.uint8), scale=torch.rand(4, 1).to(torch.float8_e4m3fn), zero_point=None, bits=4,
        group_size=16, element="e2m1", global_scale=torch.tensor([3.0]),
    ),
    "static": QuantizedTensor(
        codes=torch.zeros(2, 4, dtype=torch.uint8), scale=torch.ones(2, 1), zero_point=None, bits=8, group_size=-1, input_scale=torch.tensor([0.1]),
    ),
    "3 bits, odd": QuantizedTensor(
        codes=torch.randint(0, 8, (3, 5), dtype=torch.uint8), scale=torch.ones(3, 1).half(), zero_point=None, bits=3, group_size=-1,
    ),
    "6 bits": QuantizedTensor(
        codes=torch.randint(0, 64, (3, 4), dtype=torch.uint8), scale=torch.ones(3, 1).half(), zero_point=None, bits=6, group_size=-1,
    ),
    "ggml": GgmlTensor(type="Q4_0", blocks=torch.randint(0, 256, (2, 18), dtype=torch.uint8)),
}  # fmt: skip
REPORTS = [{"name": "a", "relative_error": 0.1 + 0.2, "bits": None}, {"name": "b", "sparsity": 1e-300}]


# ---- block files ----


def test_every_kind_of_weight_and_report_comes_back(tmp_path):
    with begin(tmp_path / "work") as journal:
        journal.write(0, "model.layers.0", WEIGHTS, REPORTS)
        journal.write(0, "decision", {}, [{"allocation": {"a": 3}}])
        for found in (journal.read(0, "model.layers.0"), journal.read(0, "model.layers.0")):
            assert list(found.weights) == list(WEIGHTS)
            assert [
                name for name in WEIGHTS if not same(found.weights[name], WEIGHTS[name].contiguous() if name == "transposed" else WEIGHTS[name])
            ] == []
            assert found.reports == REPORTS
        assert (journal.blocks(0), journal.blocks(1)) == (["decision", "model.layers.0"], [])
        assert journal.read(0, "decision").reports == [{"allocation": {"a": 3}}]
        assert journal.read(0, "model.layers.0").weights["int"].dequantize().equal(WEIGHTS["int"].dequantize())
    with begin(tmp_path / "work", resume=True) as journal:
        assert (journal.resumed, journal.assembled, journal.has(0, "model.layers.0"), journal.has(1, "model.layers.0")) == (True, False, True, False)
        assert same(journal.read(0, "model.layers.0").weights["ggml"], WEIGHTS["ggml"])
        journal.drop(0)
        assert not journal.worth_keeping()


@pytest.mark.parametrize("name", ["a/b", "..", "", "x" * 400, "x" * 400 + "y", "encoder.layer.0", "ünïcode %2F", "a\nb"])
def test_any_name_is_a_file_of_its_own_in_the_pass(name, tmp_path):
    with begin(tmp_path / "work") as journal:
        journal.write(0, "x" * 399, {"w": torch.zeros(1)})
        journal.write(0, name, {"w": torch.ones(1)})
        assert (journal.has(0, name), journal.has(0, name + "z"), float(journal.read(0, name).weights["w"])) == (True, False, 1.0)
        assert journal.blocks(0) == sorted([name, "x" * 399])
        assert len(list((tmp_path / "work" / "pass-00").iterdir())) == 2


def test_codes_of_four_bits_take_half_a_byte(tmp_path):
    with begin(tmp_path / "work") as journal:
        codes = torch.randint(0, 16, (64, 64), dtype=torch.uint8)
        weight = QuantizedTensor(codes=codes, scale=torch.ones(64, 1).half(), zero_point=None, bits=4, group_size=-1)
        journal.write(0, "b", {"w": weight})
        assert journal.kept_bytes() < 64 * 64 / 2 + 64 * 2 + 800
        assert journal.read(0, "b").weights["w"].codes.equal(codes)


def test_the_same_block_is_the_same_bytes(tmp_path):
    for folder in ("one", "two"):
        with begin(tmp_path / folder) as journal:
            journal.write(3, "b", WEIGHTS, REPORTS)
    files = [path.read_bytes() for path in sorted(tmp_path.rglob("*.block"))]
    assert len(files) == 2
    assert files[0] == files[1]


@pytest.mark.parametrize("place", [0, 3, 9, 40, -1, -33, "middle", "cut", "longer", "empty"])
def test_a_damaged_block_is_one_line_with_its_file_and_is_made_anew_once_deleted(place, tmp_path):
    with begin(tmp_path / "work") as journal:
        journal.write(0, "b", {"w": torch.ones(300)}, REPORTS)
    path = tmp_path / "work" / "pass-00" / "b.block"
    data = bytearray(path.read_bytes())
    if isinstance(place, int) or place == "middle":
        data[len(data) // 2 if place == "middle" else place] ^= 1
    path.write_bytes({"cut": data[:-100], "longer": data + b"x", "empty": b""}.get(place, data))
    with begin(tmp_path / "work", resume=True) as journal:
        with pytest.raises(OutputError) as caught:
            journal.read(0, "b")
        assert (
            str(caught.value)
            == f"{path} is damaged: its checksum does not fit; delete this file and run again with --resume, which makes the block anew."
        )
        path.unlink()
        assert not journal.has(0, "b")
        journal.write(0, "b", {"w": torch.ones(300)}, REPORTS)
        assert journal.read(0, "b").reports == REPORTS


def test_a_block_that_could_not_be_written_whole_is_not_there_and_the_former_stays(tmp_path, monkeypatch):
    """A full disk and a read-only folder, after the first bytes and at the rename."""
    with begin(tmp_path / "work") as journal:
        journal.write(0, "a", {"w": torch.ones(3)})
        for name in ("os.fsync", "os.replace"):
            with monkeypatch.context() as patch:
                patch.setattr(name, _failing)
                for block in ("a", "b"):
                    with pytest.raises(OutputError, match=r"work cannot be written: No space left on device\.$"):
                        journal.write(0, block, {"w": torch.zeros(3)})
        assert journal.blocks(0) == ["a"]
        assert journal.read(0, "a").weights["w"].equal(torch.ones(3))
        assert [path.name for path in (tmp_path / "work" / "pass-00").iterdir()] == ["a.block"]


def _failing(*_: object) -> None:
    raise OSError(28, "No space left on device")


# ---- the folder ----


def test_a_run_is_gone_on_with_only_where_that_is_asked_for(tmp_path):
    folder = work_folder(tmp_path / "out")
    assert folder == tmp_path / ".out.lighten-work"
    begin(folder).close()
    with pytest.raises(OutputError, match=rf"^{folder} holds an unfinished run; go on with it by --resume, or remove that folder to start anew\.$"):
        begin(folder)
    begin(folder, resume=True).close()


def test_what_changed_is_named(tmp_path):
    begin(tmp_path / "w").close()
    with pytest.raises(OutputError) as caught:
        begin(tmp_path / "w", resume=True, weights="abd", text="x" * 200)
    assert str(caught.value) == (
        f"{tmp_path / 'w'} was begun with another text (def, now {'x' * 97}…); weights (abc, now abd); resume it as it was begun, or remove that "
        "folder to start anew."
    )
    with pytest.raises(OutputError, match=r"begun with another threads \(none, now 4\); resume"):
        begin(tmp_path / "w", resume=True, threads="4")
    begin(tmp_path / "w", resume=True).close()


def test_nothing_to_resume_is_a_start_that_is_said(tmp_path):
    lines: list[str] = []
    with Journal.open(tmp_path / "w", IDENTITY, resume=True, log=lines.append) as journal:
        assert not journal.resumed
    assert lines == [f"nothing to resume at {tmp_path / 'w'}: starting anew"]


def test_one_process_at_a_time(tmp_path):
    with begin(tmp_path / "w"):
        for resume in (False, True):
            with pytest.raises(OutputError, match=r"/w: another process works there; wait for it, or write to another folder\.$"):
                begin(tmp_path / "w", resume=resume)
    begin(tmp_path / "w", resume=True).close()


def test_a_journal_of_another_kind_and_a_foreign_folder_are_refused_and_left_alone(tmp_path):
    folder = tmp_path / "w"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"/w holds mine\.txt and no journal\.json: it is not the folder of a run; move it away\.$"):
        begin(folder)
    assert (folder / "mine.txt").read_text() == "mine"
    (folder / "mine.txt").unlink()
    for text in ("", "[]", '{"version": 99, "state": "working", "identity": {}}', '{"version": 1}', '{"version": 1, "state": "x", "identity": {}}'):
        (folder / "journal.json").write_text(text)
        with pytest.raises(OutputError, match=r"/w/journal\.json is not a journal of this version \(.*\); remove .*/w to start anew\.$"):
            begin(folder, resume=True)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"^.*/file/w cannot be written: Not a directory\.$"):
        begin(tmp_path / "file" / "w")


def test_discard_leaves_nothing(tmp_path):
    with begin(tmp_path / "w") as journal:
        journal.write(0, "a", {"w": torch.ones(3)})
        (journal.scratch / "x").write_text("")
        journal.artifact.mkdir()
        journal.discard()
    assert list(tmp_path.iterdir()) == []


def test_scratch_is_emptied_and_the_state_is_remembered(tmp_path):
    with begin(tmp_path / "w") as journal:
        (journal.scratch / "x").write_text("")
        journal.mark("assembled")
    with begin(tmp_path / "w", resume=True) as journal:
        assert (list(journal.scratch.iterdir()), journal.assembled) == ([], True)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from lighten.compress.journal import Journal
torch.set_num_threads(1)
folder, call = Path(sys.argv[1]), sys.argv[2]

def run(number):
    original = getattr(os, call)
    def killed(*args, **more):
        nonlocal number
        number -= 1
        if number < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **more)
    setattr(os, call, killed)
    with Journal.open(folder, {"recipe": "r"}, resume=True) as journal:
        for block in "abc":
            if not journal.has(0, block):
                journal.write(0, block, {"w": torch.full((1000,), float(ord(block)))}, [{"block": block}])
        journal.mark("assembled")

def look():
    with Journal.open(folder, {"recipe": "r"}, resume=True) as journal:
        for block in journal.blocks(0):
            found = journal.read(0, block)
            assert found.weights["w"].equal(torch.full((1000,), float(ord(block)))) and found.reports == [{"block": block}]
        return journal.blocks(0), journal.assembled

for number in range(20):
    child = os.fork()
    if not child:
        run(number)
        os._exit(0)
    ended = os.waitpid(child, 0)[1]
    print(ended, *look())
    if not ended:
        break
"""


@pytest.mark.parametrize(("call", "moments"), [("fsync", 9), ("replace", 5)])
def test_killed_before_any_sync_or_rename_only_whole_blocks_are_there(call, moments, tmp_path):
    """Each kill is later than the one before in a run that goes on: so it meets every moment of it, and the last run is not met."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "w"), call], check=False, capture_output=True, text=True, timeout=200)
    *kills, last = done.stdout.splitlines()
    assert last == "0 ['a', 'b', 'c'] True", done.stderr
    assert {line.split()[0] for line in kills} == {str(int(signal.SIGKILL))}
    assert len(kills) <= moments


# ---- a whole run ----

GPTQ = "quantize(gptq, bits=4, group_size=16, embeddings=true, tokens=256)"


def windows(tokens: int) -> list[dict[str, np.ndarray]]:
    return [{"input_ids": np.random.default_rng(0).integers(0, 300, (tokens // 32, 32))}]


def compress(model: Path, out: Path, *, recipe: str = GPTQ, text: str = "t", **more: Any) -> tuple[dict[str, bytes], list[str]]:
    """The artifact's files, and what was logged; planned as on a machine that does not tell its free memory, which is never twice the same."""
    lines: list[str] = []
    work = Work(windows=windows, text=text, log=lines.append, **more)
    with mock.patch.object(memory_plan, "_available_bytes", return_value=None):
        write_artifact(model, parse_recipe(recipe), out, calibration=list, work=work)
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    return files_of(out), lines


def files_of(out: Path) -> dict[str, bytes]:
    """All but how the run went."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file() and path.name != RUN}


@pytest.fixture(scope="module")
def expected(tiny_llama, tmp_path_factory) -> dict[str, bytes]:
    """An artifact that nothing interrupted."""
    return compress(tiny_llama, tmp_path_factory.mktemp("whole") / "out")[0]


class Stop(BaseException):
    """Stands for a kill in this process: no handler knows it."""


def stopping(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, number: int, error: BaseException) -> None:
    """Let a function fail when it is called for the (number + 1)-th time."""
    original = getattr(target, name)
    calls = iter(range(10**6))

    def stops(*args: Any, **more: Any) -> Any:
        if next(calls) == number:
            raise error
        return original(*args, **more)

    monkeypatch.setattr(target, name, stops)


def stopped(
    model: Path, out: Path, monkeypatch: pytest.MonkeyPatch, target: Any = walk, name: str = "_do_block", number: int = 1, *, recipe: str = GPTQ
) -> None:
    """Begin a run, and end it at a moment."""
    with monkeypatch.context() as patch:
        stopping(patch, target, name, number, Stop())
        with pytest.raises(Stop):
            compress(model, out, recipe=recipe)


MOMENTS = {
    "before a block": (walk, "_do_block", 1), "after its work": (Journal, "write", 2), "before it has its name": (os, "replace", 5),
    "when it is written": (artifact_module, "verify_folder", 0), "before the manifest": (artifact_module, "folder_bytes", 0),
    "when it is whole": (Journal, "mark", 1), "before it has its place": (artifact_module, "_move", 0), "in its place": (Journal, "discard", 0),
}  # fmt: skip


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_is_stopped_goes_on_and_ends_in_the_same_bytes(moment, tiny_llama, tmp_path, monkeypatch, expected):
    stopped(tiny_llama, tmp_path / "out", monkeypatch, *MOMENTS[moment])
    assert work_folder(tmp_path / "out").is_dir()
    with pytest.raises(OutputError, match="go on with it by --resume, or remove that folder" if moment != "in its place" else "is not empty"):
        compress(tiny_llama, tmp_path / "out")
    found, lines = compress(tiny_llama, tmp_path / "out", resume=True)
    assert found == expected
    assert not any("model.layers.0" in line for line in lines)


SEVERAL = (
    "quantize(awq, bits=4, group_size=16, tokens=256)", "quantize(smoothquant, activations=static, tokens=256)",
    "rotate(hadamard) | quantize(gptq, bits=4, group_size=16, tokens=256) | quantize(kv)",
    "quantize(auto, bits<=5, group_size=16, tokens=256)", "quantize(rtn, bits=4, group_size=16) | distill(scales, steps=2, tokens=256)",
    "quantize(gptq, bits=4, group_size=16, tokens=256) | distill(qat, steps=2, tokens=256)",
)  # fmt: skip


@pytest.mark.parametrize("recipe", SEVERAL)
def test_every_kind_of_pass_goes_on(recipe, tiny_llama, tmp_path, monkeypatch):
    """Stopped after the first block that is journaled, and before the last."""
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    count = 0
    with monkeypatch.context() as patch:
        original = Journal.write

        def counted(*args: Any, **more: Any) -> None:
            nonlocal count
            count += 1
            original(*args, **more)

        patch.setattr(Journal, "write", counted)
        expected, _ = compress(tiny_llama, tmp_path / "whole" / "out", recipe=recipe)
    for number in sorted({min(1, count - 1), count - 1}):
        stopped(tiny_llama, tmp_path / "stopped" / "out", monkeypatch, Journal, "write", number, recipe=recipe)
        found, _ = compress(tiny_llama, tmp_path / "stopped" / "out", recipe=recipe, resume=True)
        assert found == expected
        shutil.rmtree(tmp_path / "stopped" / "out")


def test_without_an_interruption_bytes_are_the_same_in_another_process_and_place(tiny_llama, tmp_path, expected):
    """Another hash seed and another folder; nothing of them is in the bytes."""
    here = str(Path(__file__).parent)
    program = f"import sys; sys.path.insert(0, {here!r}); import test_resume as t; t.compress(t.Path(sys.argv[1]), t.Path(sys.argv[2]))"
    out = tmp_path / "elsewhere" / "out"
    out.parent.mkdir()
    environment = os.environ | {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([sys.executable, "-c", program, str(tiny_llama), str(out)], check=True, env=environment, timeout=250)
    assert files_of(out) == expected


def test_a_changed_model_recipe_or_text_is_refused_by_name(tiny_llama, tmp_path, monkeypatch, expected):
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    (tmp_path / "at").mkdir()
    out = tmp_path / "at" / "out"
    stopped(model, out, monkeypatch)
    weights = model / "model.safetensors"
    content, state = weights.read_bytes(), weights.stat()
    with pytest.raises(OutputError, match=r"begun with another recipe \(quantize\(gptq, group_.*, now .*bits=3.*\); resume it as"):
        compress(model, out, recipe=GPTQ.replace("bits=4", "bits=3"), resume=True)
    with pytest.raises(OutputError, match=r"begun with another text \(t, now another\); "):
        compress(model, out, text="another", resume=True)
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(OutputError, match=r"begun with another weights \("):
        compress(model, out, resume=True)
    weights.write_bytes(content)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with pytest.raises(OutputError, match=r"begun with another config \("):
        compress(model, out, resume=True)
    (model / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(run_identity_module, "__version__", "9.9")
    with pytest.raises(OutputError, match=r"begun with another version of lighten \(.*, now 9\.9\)"):
        compress(model, out, resume=True)
    monkeypatch.undo()
    found, _ = compress(model, out, resume=True)
    assert found["model.safetensors"] == expected["model.safetensors"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_full_disk_keeps_what_is_finished_and_says_how_to_go_on(code, tiny_llama, tmp_path, monkeypatch, expected):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stopping(patch, os, "replace", 3, OSError(code, os.strerror(code)))
        with pytest.raises(OutputError) as caught:
            compress(tiny_llama, out)
    way_out = f"What is finished stays in {work_folder(out)}: the same command with --resume goes on."
    assert str(caught.value) == f"{out} cannot be written: {os.strerror(code)}. {way_out}"
    assert compress(tiny_llama, out, resume=True)[0] == expected


def test_a_damaged_block_stops_the_run_until_it_is_deleted(tiny_llama, tmp_path, monkeypatch, expected):
    out = tmp_path / "out"
    stopped(tiny_llama, out, monkeypatch)
    (path,) = work_folder(out).glob("pass-00/model.layers.0.block")
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(OutputError, match=rf"^{path} is damaged: its checksum does not fit; delete this file and run again with --resume"):
        compress(tiny_llama, out, resume=True)
    path.unlink()
    assert compress(tiny_llama, out, resume=True)[0] == expected


def test_resume_of_what_is_finished_says_so_and_changes_nothing(tiny_llama, tmp_path):
    first, _ = compress(tiny_llama, tmp_path / "out")
    again, lines = compress(tiny_llama, tmp_path / "out", resume=True)
    assert again == first
    assert lines[-1] == f"{tmp_path / 'out'} is finished already"
    with pytest.raises(OutputError, match="is not empty"):
        compress(tiny_llama, tmp_path / "out", recipe=GPTQ.replace("bits=4", "bits=3"), resume=True)
