"""Products of fp8 codes and of 2:4 weights: the arithmetic on the CPU, the device's own behind its mark."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import bert_config, llama_config, save

from lighten.formats.artifact import Work, write_artifact
from lighten.formats.torch_model import load_module
from lighten.model import read_spec
from lighten.model.spec import Linear
from lighten.recipe import parse_recipe
from lighten.runtimes import open_session
from lighten.runtimes.cuda_products import Float8Linear, multiplies_sparse, put_fp8
from lighten.runtimes.session import Setup

FP8 = ["quantize(rtn, format=fp8, activations=dynamic)", "quantize(rtn, format=fp8, activations=static)"]
SPARSE = "prune(magnitude, pattern=2:4)"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    work = tmp_path_factory.mktemp("models")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return {"bert": save(bert_config(**sizes), work / "bert"), "llama": save(llama_config(**sizes), work / "llama")}


def ids(batch_size: int = 2, seq_len: int = 17) -> np.ndarray:
    return np.random.default_rng(3).integers(5, 320, (batch_size, seq_len))


def calibration() -> list[dict[str, np.ndarray]]:
    return [{"input_ids": ids(1, 24), "attention_mask": np.ones((1, 24), np.int64)}]


def error(found: torch.Tensor | np.ndarray, expected: torch.Tensor | np.ndarray) -> float:
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("recipe", FP8)
def test_products_of_fp8_are_what_is_simulated(family: str, recipe: str, models: dict[str, Path], tmp_path: Path) -> None:
    folder = write_artifact(
        models[family], parse_recipe(recipe), tmp_path / "artifact", calibration=list, work=Work(windows=lambda tokens: calibration())
    ).folder
    spec = read_spec(folder)
    simulated, found = (load_module(folder, spec, dtype="float32", attention="sdpa") for _ in range(2))
    wide = load_module(folder, spec, dtype="float32", attention="sdpa")
    for module in wide.modules():
        module._forward_pre_hooks.clear()
    expected = sum(bool(part.weight.activations) for part in spec.parts if isinstance(part, Linear))
    assert put_fp8(found, folder, spec) == expected == sum(isinstance(module, Float8Linear) for module in found.modules())
    x = torch.randn(2, 17, 64, generator=torch.Generator().manual_seed(5))
    for name, linear in found.named_modules():
        if isinstance(linear, Float8Linear):
            given = x.repeat(1, 1, linear.codes.shape[1] // 64)
            with torch.inference_mode():
                outputs = [linear(given), simulated.get_submodule(name)(given), wide.get_submodule(name)(given)]
            assert error(outputs[0], outputs[1]) < 3e-3 < 1e-2 < error(outputs[2], outputs[1])  # bfloat16's rounding of what is given back


@pytest.mark.parametrize(
    ("rows", "columns", "dtype", "zeros", "expected"),
    [
        (32, 64, torch.float16, "1100", True), (32, 64, torch.bfloat16, "0101", True), (32, 64, torch.float16, "0000", True),
        (32, 64, torch.float16, "1110", False), (32, 64, torch.float32, "1100", False), (24, 64, torch.float16, "1100", False),
        (32, 32, torch.float16, "1100", False),
    ],
)  # fmt: skip
def test_which_weights_are_multiplied_sparsely(rows: int, columns: int, dtype: torch.dtype, zeros: str, expected: bool) -> None:
    kept = torch.tensor([int(digit) for digit in zeros], dtype=dtype).repeat(columns // 4)
    assert multiplies_sparse(torch.ones(rows, columns, dtype=dtype) * kept) is expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("runtime", ["torch", "torch-compile"])
@pytest.mark.parametrize(
    ("recipe", "dtype", "product", "capability"), [*((text, "bfloat16", "fp8", (8, 9)) for text in FP8), (SPARSE, "float16", "2:4", (8, 0))]
)
def test_a_device_multiplies_what_it_has_instructions_for(
    family: str, runtime: str, recipe: str, dtype: str, product: str, capability: tuple[int, int], models: dict[str, Path], tmp_path: Path
) -> None:
    folder = write_artifact(
        models[family], parse_recipe(recipe), tmp_path / "artifact", calibration=list, work=Work(windows=lambda tokens: calibration())
    ).folder
    spec = read_spec(folder)
    cpu = open_session("torch", folder, spec, Setup(dtype="float32", threads=1))
    found = open_session(runtime, folder, spec, Setup(dtype=dtype, threads=1, device="cuda"))
    able = torch.cuda.get_device_capability() >= capability
    assert found.precision == (f"{dtype}, products of {product}" if able else dtype)
    if family == "bert":
        assert error(found.encode(ids(), np.ones_like(ids())), cpu.encode(ids(), np.ones_like(ids()))) < 0.05
    else:
        assert error(found.logits(ids()), cpu.logits(ids())) < 0.05
        assert found.generate(ids(), 4).ids.shape == (2, 4)
