"""NNCF: weights of an OpenVINO model compressed by rounding, AWQ, scale estimation or GPTQ, saved as OpenVINO IR. Run by compression.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import compress_job
import nncf
import numpy as np
import openvino as ov
import torch
from transformers import AutoModel, AutoModelForCausalLM

REQUIREMENTS = ("torch==2.13.0", "nncf==3.4.0", "openvino==2026.4.1", "transformers==5.23.0")
BITS = {"u1": 1, "u2": 2, "i2": 2, "u3": 3, "i4": 4, "u4": 4, "i8": 8, "u8": 8, "f16": 16, "bf16": 16, "f32": 32, "i32": 32, "i64": 64}


class Logits(torch.nn.Module):
    """input_ids → logits, no cache, the mask given: a signature that OpenVINO traces."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> Any:
        return self.model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False).logits


def converted(job: compress_job.Job) -> Any:
    """The model in OpenVINO, with dynamic length and 16-bit constants left as they are when it is saved."""
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32, attn_implementation="eager")
    return ov.convert_model(Logits(model), example_input=torch.zeros(1, 16, dtype=torch.int64), input=[("input_ids", ov.PartialShape([1, -1]))])


def options(settings: dict[str, Any], dataset: Any) -> dict[str, Any]:
    """Arguments of `nncf.compress_weights` that the method stands for. Embeddings and head stay as they are, but with `all_layers`."""
    if settings["bits"] != 4:
        raise ValueError(f"NNCF packs 4 and 8 bits, and {settings['bits']} were asked for.")
    mode = nncf.CompressWeightsMode.INT4_SYM if settings["symmetric"] else nncf.CompressWeightsMode.INT4_ASYM
    shared = {
        "mode": mode,
        "ratio": 1.0,
        "group_size": settings["group_size"],
        "all_layers": settings.get("all_layers", False),
        "backup_mode": nncf.BackupMode.NONE,
    }
    methods: dict[str, dict[str, Any]] = {
        "rtn": {}, "awq+scale_estimation": {"dataset": dataset, "awq": True, "scale_estimation": True}, "gptq": {"dataset": dataset, "gptq": True},
        "gptq+scale_estimation": {"dataset": dataset, "gptq": True, "scale_estimation": True},
    }  # fmt: skip
    return shared | methods[settings["method"]]


# ---- the artifact's weights ----


def constants(node: Any) -> list[Any]:
    """The constants below a weight's node, through conversions, scales and shapes."""
    if node.get_type_name() == "Constant":
        return [node]
    return [found for value in node.input_values() for found in constants(value.get_node())]


def evaluate(node: Any) -> Any:
    """The array that a weight's nodes stand for: Constant, Convert, Subtract, Multiply and Reshape, in float32."""
    kind = node.get_type_name()
    if kind == "Constant":
        return node.get_data(dtype=np.int64 if node.get_element_type().is_integral() else np.float32)
    below = [evaluate(value.get_node()) for value in node.input_values()]
    if kind == "Convert":
        return below[0].astype(np.float32)
    if kind == "Reshape":
        return below[0].reshape([int(size) for size in below[1]])
    if kind in ("Multiply", "Subtract"):
        return below[0] * below[1] if kind == "Multiply" else below[0] - below[1]
    raise ValueError(f"{node.get_friendly_name()}: {kind} is no part of a compressed weight that is known here.")


def is_weight(node: Any) -> bool:
    if node.get_type_name() == "Constant":
        return node.get_element_type().get_type_name() not in ("i64", "boolean")
    return node.get_type_name() in ("Convert", "Subtract", "Multiply", "Reshape") and is_weight(node.input_value(0).get_node())


def module_of(node: Any) -> str:
    """The module of a MatMul in OpenVINO's name of it: `__module.model.model.layers.0.mlp.up_proj/aten::linear/MatMul`."""
    return str(node.get_friendly_name()).partition("/")[0].removeprefix("__module.model.")


def weights_of(model: Any, linears: dict[str, int]) -> dict[str, Any]:
    """Module → the node that gives its weight."""
    found = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MatMul" and is_weight(node.input_value(1).get_node()) and module_of(node) in linears:
            found[module_of(node)] = node.input_value(1).get_node()
    if missing := sorted(set(linears) - set(found)):
        raise ValueError(f"{len(missing)} of {len(linears)} linears are not in the model, {missing[0]} for one.")
    return found


def embedding_of(model: Any) -> tuple[str, Any]:
    """The embedding table's module and the node that gives it."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Gather" and is_weight(node.input_value(0).get_node()) and "embed" in module_of(node):
            return module_of(node), node.input_value(0).get_node()
    raise ValueError("no table of an embedding is in the model.")


def kept_tensors(node: Any, codes: int) -> dict[str, float]:
    """Bits of a weight's constants by what they are: the largest holds the codes, whole numbers else are zero points, floats are scales."""
    sums = dict.fromkeys(("codes", "scale", "zero"), 0.0)
    for constant in constants(node):
        kind, count = constant.get_element_type().get_type_name(), int(np.prod(list(constant.get_output_shape(0))))
        if kind not in ("i64", "i32"):
            sums["codes" if count == codes else "zero" if kind[0] in "ui" else "scale"] += count * BITS[kind]
    return sums


def check_outputs(model: Any, dense: dict[str, Any], job: compress_job.Job) -> float:
    """The relative difference of logits between the OpenVINO model and the dense weights in the original's architecture, on 64 tokens."""
    ids = compress_job.windows(job)[:1, :64]
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}  # else it rounds activations to 8 bits on its own
    compiled = ov.Core().compile_model(model, "CPU", exact)
    theirs = torch.from_numpy(compiled([ids.numpy()])[0])
    original = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    original.load_state_dict(dense, strict=False)
    with torch.inference_mode():
        ours = original(input_ids=ids).logits
    return float((theirs - ours).norm() / ours.norm())


class Hidden(torch.nn.Module):
    """input_ids, attention_mask → the last hidden states."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def encoder(job: compress_job.Job, meter: compress_job.Meter) -> None:
    """Post-training quantization of an encoder's weights and activations to int8, with the package's settings for Transformers."""
    plain = AutoModel.from_pretrained(job.model, dtype=torch.float32, attn_implementation="eager")
    example = {name: torch.ones(1, 16, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    model = ov.convert_model(Hidden(plain), example_input=example)
    with meter.quantizing():
        model = nncf.quantize(model, nncf.Dataset(compress_job.calibration_texts(job)), model_type=nncf.ModelType.TRANSFORMER)
    Path(job.artifact).mkdir(parents=True)
    ov.save_model(model, Path(job.artifact) / "openvino_model.xml")
    meter.saved()
    compiled = ov.Core().compile_model(Path(job.artifact) / "openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    compress_job.write_embeddings(job, lambda ids, mask: compiled({"input_ids": ids, "attention_mask": mask})[0])
    meter.report(job, "nncf", {})


def main() -> None:
    job, meter = compress_job.read_job(), compress_job.Meter()
    if job.texts:
        encoder(job, meter)
        return
    rows = compress_job.windows(job).numpy()
    model = converted(job)
    dataset = nncf.Dataset([row[None] for row in rows])
    with meter.quantizing():
        model = nncf.compress_weights(model, subset_size=len(rows), **options(job.settings, dataset))
    Path(job.artifact).mkdir(parents=True)
    ov.save_model(model, Path(job.artifact) / "openvino_model.xml", compress_to_fp16=True)
    meter.saved()
    linears = compress_job.linears_of(job.model)
    saved = ov.Core().read_model(Path(job.artifact) / "openvino_model.xml")
    nodes = weights_of(saved, linears)
    sums = [kept_tensors(node, linears[name]) for name, node in nodes.items()]
    total = sum(linears.values())
    stored = {kind: sum(part[kind] for part in sums) / total for kind in ("codes", "scale", "zero")}
    from safetensors.torch import load_file

    dense: dict[str, Any] = {}
    for file in sorted(Path(job.model).glob("*.safetensors")):
        dense |= load_file(file)
    if job.settings.get("all_layers"):
        nodes |= dict([embedding_of(saved)])
    shapes = {name: dense[f"{name}.weight"].shape for name in nodes}
    dense |= {f"{name}.weight": torch.from_numpy(np.ascontiguousarray(evaluate(node))).reshape(shapes[name]) for name, node in nodes.items()}
    if (error := check_outputs(model, dense, job)) > 0.02:
        raise ValueError(f"the dense weights give logits {error:.3f} off from the OpenVINO model's: it changed more than the linears' weights.")
    compress_job.write_dense(job, dense)
    meter.report(job, "nncf", {"bits": job.settings["bits"] + stored["scale"] + stored["zero"], "stored_bits": sum(stored.values())})


if __name__ == "__main__":
    main()
