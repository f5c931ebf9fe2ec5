"""Checkpoints of every common method of quantization, and what checkpoints hold that their architecture does not: bytes to the last one.

The tensors come from the method's own code where transformers or compressed-tensors has it, else from the format's definition, written out here.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from lighten.errors import ModelError
from lighten.model import read_spec
from lighten.model.spec import Linear, ModelSpec

Tensors = dict[str, torch.Tensor]

LLAMA: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 192, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 352,
    "dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DEEPSEEK: dict[str, Any] = LLAMA | {
    "num_key_value_heads": 6, "kv_lora_rank": 40, "q_lora_rank": 72, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32, "head_dim": 16,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 136, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
GPT_OSS: dict[str, Any] = LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 96, "head_dim": 32}


def plain(tmp_path: Path, model_type: str, architecture: str, fields: dict[str, Any]) -> tuple[dict[str, Any], Tensors]:
    """Config and tensors of an unquantized checkpoint, as `save_pretrained` writes them, in bfloat16."""
    model = getattr(transformers, architecture)(AutoConfig.for_model(model_type, **fields)).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "plain")
    return json.loads((tmp_path / "plain" / "config.json").read_text()), load_file(tmp_path / "plain" / "model.safetensors")


def llama(tmp_path: Path, **fields: Any) -> tuple[dict[str, Any], Tensors]:
    return plain(tmp_path, "llama", "LlamaForCausalLM", LLAMA | fields)


def read(tmp_path: Path, config: dict[str, Any], tensors: Tensors, quantization: dict[str, Any] | None = None) -> ModelSpec:
    folder = tmp_path / "quantized"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | ({"quantization_config": quantization} if quantization else {})))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return read_spec(folder)


def read_config_alone(tmp_path: Path, config: dict[str, Any], quantization: Any) -> ModelSpec:
    folder = tmp_path / "alone"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return read_spec(folder)


def stored(tensors: Tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def elements(tensors: Tensors) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def linears(tensors: Tensors) -> list[str]:
    """Modules whose weight a method quantizes in a decoder: those of the blocks that are no norms and no routers."""
    return [
        name.removesuffix(".weight") for name, tensor in tensors.items()
        if ".layers." in name and name.endswith(".weight") and tensor.ndim == 2 and not name.endswith("mlp.gate.weight")
    ]  # fmt: skip


def replaced(tensors: Tensors, made: Any) -> Tensors:
    """The checkpoint with `made(out_features, in_features)` in the place of each quantized weight: what follows the name → tensor."""
    found = dict(tensors)
    for module in linears(tensors):
        rows, columns = found.pop(f"{module}.weight").shape
        found |= {module + suffix: tensor for suffix, tensor in made(rows, columns).items()}
    return found


def check(tmp_path: Path, config: dict[str, Any], before: Tensors, after: Tensors, quantization: dict[str, Any]) -> None:
    """The same from the checkpoint and from its config alone: its bytes, and the parameters of the model that it was made of."""
    for spec in (read(tmp_path, config, after, quantization), read_config_alone(tmp_path, config, quantization)):
        assert spec.weight_bytes() == stored(after)
        assert spec.total_parameters == elements(before)
        assert spec.dtype == "bfloat16"
        assert spec.notes == ()


# by the formats' definitions


def gptq(bits: int, group: int) -> Any:
    def made(rows: int, columns: int) -> Tensors:
        groups = 1 if group == -1 else math.ceil(columns / group)
        return {
            ".qweight": torch.zeros(columns * bits // 32, rows, dtype=torch.int32), ".g_idx": torch.zeros(columns, dtype=torch.int32),
            ".qzeros": torch.zeros(groups, rows * bits // 32, dtype=torch.int32), ".scales": torch.zeros(groups, rows, dtype=torch.float16),
        }  # fmt: skip

    return made


@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 32), (8, -1), (3, 64), (2, 64)])
def test_gptq(tmp_path, bits, group):
    config, before = llama(tmp_path)
    quantization = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": True, "sym": True, "lm_head": False}
    check(tmp_path, config, before, replaced(before, gptq(bits, group)), quantization)


def test_gptq_with_biases_of_zeros_that_the_model_has_not(tmp_path):
    config, before = llama(tmp_path)
    after = replaced(before, gptq(4, 128))
    biases = {f"{module}.bias": torch.zeros(before[f"{module}.weight"].shape[0], dtype=torch.float16) for module in linears(before)}
    spec = read(tmp_path, config, after | biases, {"quant_method": "gptq", "bits": 4, "group_size": 128})
    assert spec.weight_bytes() == stored(after)
    assert spec.notes == (f"{len(biases)} tensors of {stored(biases)} bytes left out: what the quantization stores beside its weights",)


def test_gptq_leaves_out_what_its_dynamic_rules_name(tmp_path):
    config, before = llama(tmp_path)
    after = replaced(before, gptq(4, 128))
    down = {f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)}
    mixed = {name: tensor for name, tensor in after.items() if name.rpartition(".")[0] not in down}
    mixed |= {f"{module}.weight": before[f"{module}.weight"] for module in down}
    check(tmp_path, config, before, mixed, {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {r"-:.*down_proj": {}}})


def test_gptq_of_some_modules(tmp_path):
    config, before = llama(tmp_path)
    after = {name: tensor for name, tensor in before.items() if "up_proj" not in name}
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"):
        after |= {name + suffix: tensor for suffix, tensor in gptq(4, 128)(352, 192).items()}
    check(tmp_path, config, before, after, {"quant_method": "gptq", "bits": 4, "modules_in_block_to_quantize": [["mlp.up_proj"]]})


@pytest.mark.parametrize("group", [128, 64, -1])
def test_awq(tmp_path, group):
    def made(rows: int, columns: int) -> Tensors:
        groups = 1 if group == -1 else math.ceil(columns / group)
        return {
            ".qweight": torch.zeros(columns, rows // 8, dtype=torch.int32), ".qzeros": torch.zeros(groups, rows // 8, dtype=torch.int32),
            ".scales": torch.zeros(groups, rows, dtype=torch.float16),
        }  # fmt: skip

    config, before = llama(tmp_path)
    quantization = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm", "modules_to_not_convert": None}
    check(tmp_path, config, before, replaced(before, made), quantization)


def bnb4(double: bool) -> Any:
    def made(rows: int, columns: int) -> Tensors:
        blocks = math.ceil(rows * columns / 64)
        found = {
            ".weight": torch.zeros(rows * columns // 2, 1, dtype=torch.uint8), ".weight.quant_map": torch.zeros(16),
            ".weight.absmax": torch.zeros(blocks, dtype=torch.uint8 if double else torch.float32),
        }  # fmt: skip
        nested = {".weight.nested_absmax": torch.zeros(math.ceil(blocks / 256)), ".weight.nested_quant_map": torch.zeros(256)}
        return found | (nested if double else {})

    return made


@pytest.mark.parametrize("double", [True, False])
def test_bitsandbytes_of_4_bits(tmp_path, double):
    config, before = llama(tmp_path)
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double}
    check(tmp_path, config, before, replaced(before, bnb4(double)), quantization | {"bnb_4bit_quant_storage": "uint8"})


def test_the_descriptions_that_bitsandbytes_stores_are_left_out_with_a_note(tmp_path):
    config, before = llama(tmp_path)
    after = replaced(before, bnb4(double=True))
    described = {f"{module}.weight.quant_state.bitsandbytes__nf4": torch.zeros(150, dtype=torch.uint8) for module in linears(before)}
    spec = read(tmp_path, config, after | described, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True})
    assert spec.weight_bytes() == stored(after)
    assert spec.notes == (f"14 tensors of {14 * 150} bytes left out: what the quantization stores beside its weights",)


def test_bitsandbytes_of_8_bits_skips_what_it_is_told_to(tmp_path):
    def made(rows: int, columns: int) -> Tensors:
        return {
            ".weight": torch.zeros(rows, columns, dtype=torch.int8), ".SCB": torch.zeros(rows), ".weight_format": torch.tensor(0, dtype=torch.uint8)
        }  # fmt: skip

    config, before = llama(tmp_path)
    after = replaced(before, made)
    kept = "model.layers.1.mlp.down_proj"
    for suffix in made(1, 1):
        del after[kept + suffix]
    after[f"{kept}.weight"] = before[f"{kept}.weight"]
    check(
        tmp_path, config, before, after,
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": ["lm_head", "layers.1.mlp.down_proj"]},
    )  # fmt: skip


def test_mxfp4_of_gpt_oss(tmp_path):
    config, before = plain(tmp_path, "gpt_oss", "GptOssForCausalLM", GPT_OSS)
    after = dict(before)
    for name in [name for name in before if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = after.pop(name).shape
        after[f"{name}_blocks"] = torch.zeros(experts, rows, columns // 32, 16, dtype=torch.uint8)
        after[f"{name}_scales"] = torch.zeros(experts, rows, columns // 32, dtype=torch.uint8)
    assert len(after) == len(before) + 4
    listed = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    check(tmp_path, config, before, after, {"quant_method": "mxfp4", "modules_to_not_convert": listed})


# by the methods' own code


def own_modules(model_type: str, architecture: str, fields: dict[str, Any], swap: Any) -> Tensors:
    """The tensors of a model whose linears transformers has exchanged for the method's own."""
    with torch.device("meta"):
        model = getattr(transformers, architecture)(AutoConfig.for_model(model_type, **fields)).to(torch.bfloat16)
        swap(model)
    return {name: torch.empty_like(tensor, device="cpu") for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("block", "scheme"), [([128, 128], "dynamic"), ([64, 32], "static"), (None, "dynamic"), (None, "static")])
def test_fp8_of_blocks(tmp_path, block, scheme):
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear
    from transformers.utils.quantization_config import FineGrainedFP8Config

    chosen = FineGrainedFP8Config(weight_block_size=block, activation_scheme=scheme)

    def swap(model: Any) -> None:
        replace_with_fp8_linear(model, modules_to_not_convert=["lm_head"], quantization_config=chosen, pre_quantized=True)

    config, before = llama(tmp_path)
    after = own_modules("llama", "LlamaForCausalLM", LLAMA, swap)
    assert set(after) > set(before)
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": block, "activation_scheme": scheme}
    check(tmp_path, config, before, after, quantization)


def test_fp8_of_deepseek_with_the_layers_that_predict_further(tmp_path):
    """Each expert's matrix and its scales by themselves, in blocks that do not divide it; the router and its balance are left alone."""

    def made(rows: int, columns: int) -> Tensors:
        scales = torch.zeros(math.ceil(rows / 128), math.ceil(columns / 128))
        return {".weight": torch.zeros(rows, columns, dtype=torch.float8_e4m3fn), ".weight_scale_inv": scales}

    config, before = plain(tmp_path, "deepseek_v3", "DeepseekV3ForCausalLM", DEEPSEEK)
    after = replaced(before, made)
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    # the balance is a buffer, which is stored and no parameter
    buffers = {name: tensor for name, tensor in before.items() if name.endswith("e_score_correction_bias")}
    further = {name.replace("layers.1.", "layers.2."): tensor.clone() for name, tensor in after.items() if ".layers.1." in name}
    further["model.layers.2.eh_proj.weight"] = torch.zeros(192, 384, dtype=torch.bfloat16)
    spec = read(tmp_path, config | {"num_nextn_predict_layers": 1}, after | further, quantization)
    assert spec.weight_bytes() == stored(after)
    assert spec.total_parameters == elements(before) - elements(buffers)
    assert spec.notes == (f"{len(further)} tensors of {stored(further)} bytes left out: multi-token prediction",)
    alone = read_config_alone(tmp_path, config, quantization)
    assert (alone.weight_bytes(), alone.total_parameters) == (spec.weight_bytes(), spec.total_parameters)


@pytest.mark.parametrize("method", ["eetq", "bitnet", "fbgemm_fp8"])
def test_linears_of_other_methods(tmp_path, method):
    from transformers.integrations import bitnet, eetq, fbgemm_fp8

    made = {
        "eetq": lambda i, o: eetq.EetqLinear(i, o), "bitnet": lambda i, o: bitnet.BitLinear(i, o, bias=False, dtype=torch.bfloat16),
        "fbgemm_fp8": lambda i, o: fbgemm_fp8.FbgemmFp8Linear(i, o, bias=False),
    }[method]  # fmt: skip

    def swap(model: Any) -> None:
        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                model.set_submodule(name, made(module.in_features, module.out_features))

    config, before = llama(tmp_path)
    check(tmp_path, config, before, own_modules("llama", "LlamaForCausalLM", LLAMA, swap), {"quant_method": method})


SCHEMES: dict[str, dict[str, Any]] = {
    "float-quantized by channel": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}},
    "float-quantized by tensor": {
        "weights": {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True},
        "input_activations": {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False},
    },
    "float-quantized by block": {"weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128], "symmetric": True}},
    "int-quantized by channel": {
        "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
        "input_activations": {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True},
    },
    "pack-quantized by group": {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}},
    "nvfp4-pack-quantized by group": {
        "weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True,
                    "scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors(tmp_path, name):
    """The package compresses a model; its own words for what it did are the config."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    kind, scheme = name.split(" by ")[0], {"targets": ["Linear"], **SCHEMES[name]}
    quantization = {"quant_method": "compressed-tensors", "format": kind, "ignore": ["lm_head"], "config_groups": {"group_0": scheme}}
    config, before = llama(tmp_path)
    model = transformers.LlamaForCausalLM(AutoConfig.for_model("llama", **LLAMA)).to(torch.bfloat16)
    chosen = QuantizationConfig.model_validate({key: value for key, value in quantization.items() if key != "quant_method"})
    apply_quantization_config(model, chosen)
    ModelCompressor.from_pretrained_model(model).compress_model(model)
    after = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    shapes = {key: tensor for key, tensor in after.items() if key.endswith("weight_shape")}  # the package's own, 8 or 16 bytes a weight
    spec = read(tmp_path, config, after, quantization)
    assert spec.weight_bytes() == stored(after) - stored(shapes)
    assert spec.total_parameters == elements(before)
    assert read_config_alone(tmp_path, config, quantization).weight_bytes() == spec.weight_bytes()


# what is refused, and what is left out


@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        ({"quant_method": "vptq"}, "weights quantized by the method 'vptq' cannot be read; these can: compressed-tensors, fp8, gptq, awq"),
        ({"quant_method": "gptq"}, "its quantization_config cannot be read (ValueError: bits=None is not a whole number)"),
        ({"quant_method": "gptq", "bits": 5}, "bits=5 is none of 2, 3, 4, 8"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size=0 is neither -1 nor positive"),
        ({"quant_method": "awq", "version": "gemv"}, "version=gemv has another layout than gemm"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size=[128] is not a pair of positive whole numbers"),
        ({"quant_method": "fp8", "activation_scheme": "fixed"}, "activation_scheme='fixed'"),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, "expert_dtype other than fp8 and modules_to_convert are not described"),
        ({"quant_method": "bitsandbytes"}, "neither load_in_4bit nor load_in_8bit is set"),
        ({"quant_method": "eetq", "modules_to_not_convert": "lm_head"}, "modules_to_not_convert is not a list of names"),
        (
            {"quant_method": "compressed-tensors", "format": "marlin-24", "config_groups": {"g": {"targets": ["Linear"], "weights": {}}}},
            "format 'marlin-24' is not known; known: pack-quantized, float-quantized",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused_with_weights_and_noted_without(tmp_path, quantization, says):
    config, tensors = llama(tmp_path)
    if quantization["quant_method"] != "eetq":  # there what the config lists does not count: the checkpoint shows it
        with pytest.raises(ModelError) as refused:
            read(tmp_path, config, tensors, quantization)
        assert says in str(refused.value)
    alone = read_config_alone(tmp_path, config, quantization)
    assert alone.weight_bytes() == stored(tensors)
    assert len(alone.notes) == 1
    assert says in alone.notes[0]
    method = quantization["quant_method"]
    assert alone.notes[0].startswith(f"its quantization_config ({method}) is not applied: every weight is counted as bfloat16 (")


HOSTILE: list[Any] = [None, True, 0, -1, 3, 10**30, 1.5, float("inf"), "", "int4", [], [1], [["x"]], [0, 1], {}, {"(": 1}, {"a": {"bits": 4}}]
WHOLE: list[dict[str, Any]] = [
    {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {}, "modules_in_block_to_quantize": None, "lm_head": False},
    {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "modules_to_not_convert": None},
    {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "scale_fmt": "float", "modules_to_not_convert": None},
    {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_storage": "uint8", "llm_int8_skip_modules": None},
    {"quant_method": "bitnet", "quantization_mode": "offline", "modules_to_not_convert": ["("]},
    {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": [], "config_groups": {"g": {"targets": ["Linear"]}}},
]


@pytest.mark.parametrize("whole", WHOLE, ids=lambda whole: str(whole["quant_method"]))
def test_no_field_whatever_its_value_ends_in_another_error(tmp_path, whole):
    """Each is either applied, or noted: the estimate from a config alone always answers."""
    config = LLAMA | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    scheme = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "block_structure": [1, 1]}
    changes = [{name: value} for name in whole if name != "quant_method" for value in HOSTILE]
    if "config_groups" in whole:
        weights = [scheme | {name: value} for name in scheme for value in [*HOSTILE, "block"]]
        changes += [{"config_groups": {"g": {"targets": ["Linear"], "weights": each}}} for each in weights]
    for change in changes:
        spec = read_config_alone(tmp_path, config, whole | change)
        assert spec.weight_bytes() > 0
        assert len(spec.notes) <= 1


def test_stacked_experts_that_a_method_does_not_fix_are_refused(tmp_path):
    config, _ = plain(tmp_path, "gpt_oss", "GptOssForCausalLM", GPT_OSS)
    alone = read_config_alone(tmp_path, config, {"quant_method": "fp8"})
    assert "how it stores model.layers.0.mlp.experts.gate_up_proj, the weights of all experts, is not known" in alone.notes[0]


def test_groups_that_do_not_divide_the_columns_are_refused(tmp_path):
    config, _ = plain(tmp_path, "gpt_oss", "GptOssForCausalLM", GPT_OSS | {"intermediate_size": 48})
    alone = read_config_alone(tmp_path, config, {"quant_method": "mxfp4"})
    assert "model.layers.0.mlp.experts.down_proj has 48 columns, which groups of 32 do not divide" in alone.notes[0]


def test_a_weight_without_its_scales_is_a_contradiction(tmp_path):
    config, before = llama(tmp_path)
    after = replaced(before, gptq(4, 128))
    del after["model.layers.1.mlp.up_proj.scales"]
    with pytest.raises(ModelError, match=r"contradict each other: model\.layers\.1\.mlp\.up_proj\.scales is missing\."):
        read(tmp_path, config, after, {"quant_method": "gptq", "bits": 4, "group_size": 128})


def test_groups_of_another_size_than_the_config_says_are_a_contradiction(tmp_path):
    config, before = llama(tmp_path)
    with pytest.raises(ModelError, match=r"qzeros is \[6, 24\], the config says \[2, 24\]"):
        read(tmp_path, config, replaced(before, gptq(4, 32)), {"quant_method": "gptq", "bits": 4, "group_size": 128})


def test_other_methods_codes_are_not_run_or_compressed(tmp_path):
    from lighten.compress.walk import Checkpoint, compress_weights
    from lighten.formats.safetensors_folder import expanded_weights
    from lighten.recipe import parse_recipe

    config, before = llama(tmp_path)
    spec = read(tmp_path, config, replaced(before, gptq(4, 128)), {"quant_method": "gptq", "bits": 4, "group_size": 128})
    folder, says = tmp_path / "quantized", r"is stored as another method's 4-bit codes, which can be estimated and not be read"
    with pytest.raises(ModelError, match=says):
        next(expanded_weights(folder, spec))
    with pytest.raises(ModelError, match=says):
        next(compress_weights(Checkpoint(folder), spec, parse_recipe("@ torch")))


def test_the_head_and_the_last_module_are_left_alone(tmp_path):
    config, _ = llama(tmp_path)
    spec = read_config_alone(tmp_path, config | {"architectures": ["LlamaForSequenceClassification"]}, {"quant_method": "fp8"})
    plain_ones = [part.name for part in spec.parts if isinstance(part, Linear) and part.weight.bits is None]
    assert plain_ones == ["score"]


GPT2: dict[str, Any] = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "bos_token_id": 1, "eos_token_id": 2}
BERT: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
MASKS = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 16, 16, dtype=torch.uint8) for layer in (0, 1)}


@pytest.mark.parametrize(
    ("model_type", "architecture", "fields", "more", "what"),
    [
        ("gpt2", "GPT2LMHeadModel", GPT2, MASKS, "masks of attention"),
        ("llama", "LlamaForCausalLM", LLAMA, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}, "rotary frequencies"),
        ("bert", "BertForMaskedLM", BERT, {"cls.seq_relationship.weight": torch.ones(2, 32)}, "the head of next-sentence prediction"),
        ("bert", "BertForMaskedLM", BERT, {"bert.pooler.dense.weight": torch.ones(32, 32)}, "a pooler that the architecture does not use"),
        ("llama", "LlamaForCausalLM", LLAMA, {"model.mtp.0.weight": torch.ones(8, 8)}, "multi-token prediction"),
    ],
)  # fmt: skip
def test_tensors_that_transformers_leaves_out_are_left_out_with_a_note(tmp_path, model_type, architecture, fields, more, what):
    config, tensors = plain(tmp_path, model_type, architecture, fields)
    spec = read(tmp_path, config, tensors | more)
    count = "1 tensor" if len(more) == 1 else f"{len(more)} tensors"
    assert spec.notes == (f"{count} of {stored(more)} bytes left out: {what}",)
    assert spec.weight_bytes() == stored(tensors)
    assert spec.tensors is not None
    assert not {tensor.name for tensor in spec.tensors} & set(more)


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "model.extra.weight", "model.layers.0.self_attn.q_proj.bias"])
def test_other_tensors_stay_a_contradiction(tmp_path, name):
    config, tensors = llama(tmp_path)
    with pytest.raises(ModelError, match=f"{name} is not in the architecture"):
        read(tmp_path, config, tensors | {name: torch.ones(4, 4)})


def test_towers_of_different_widths_cannot_be_compared(tmp_path):
    config = AutoConfig.for_model("siglip").to_dict() | {"architectures": ["SiglipModel"]}
    config["text_config"]["projection_size"] = 512
    (tmp_path / "config.json").write_text(json.dumps(config, default=str))
    with pytest.raises(ModelError, match="texts come as 512 values and images as 768; they must be as many to be compared"):
        read_spec(tmp_path)


@pytest.mark.parametrize(("layers", "experts", "billions", "gibibytes"), [(36, 128, 116.83, 60.8), (24, 32, 20.91, 12.8)])
def test_gpt_oss_is_as_large_as_its_model_card_says(tmp_path, layers, experts, billions, gibibytes):
    """Source: the gpt-oss model card (arXiv:2508.10925), table 1: total parameters and checkpoint size of gpt-oss-120b and gpt-oss-20b."""
    config = {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": layers,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": experts, "num_experts_per_tok": 4,
        "sliding_window": 128, "vocab_size": 201088, "attention_bias": True, "max_position_embeddings": 131072, "dtype": "bfloat16",
    }  # fmt: skip
    listed = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    spec = read_config_alone(tmp_path, config, {"quant_method": "mxfp4", "modules_to_not_convert": listed})
    assert round(spec.total_parameters / 1e9, 2) == billions
    assert round(spec.weight_bytes() / 2**30, 1) == gibibytes
