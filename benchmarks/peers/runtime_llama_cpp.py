"""llama.cpp by its own quantizer, from a file that gguf-py writes. Run by benchmarks/runtimes.py.

A native build of llama.cpp dies on the first quantized product on virtual machines with AMX (llama.cpp #20824): its row says so there.
"""

from __future__ import annotations

import ctypes
import json
import time
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import runtime_job
from safetensors.numpy import load_file

REQUIREMENTS = ("llama-cpp-python==0.3.36", "gguf==0.19.0", "safetensors", "numpy", "tokenizers")
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "Q4_K_M": 15}
"""llama_ftype of include/llama.h."""
NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


class LlamaCpp(runtime_job.Engine):
    """settings: type, as llama-quantize names it. The cache, flash attention and batches are as the package has them."""

    PACKAGE = "llama-cpp-python"

    def __init__(self, model: Path, work: Path, settings: dict[str, Any]) -> None:
        llama_cpp.llama_backend_init()
        self.file = work / f"{settings['type']}.gguf"
        if not self.file.exists():
            build(model, self.file, FILE_TYPES[settings["type"]], self.threads)
        asked = llama_cpp.llama_model_default_params()
        asked.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(self.file).encode(), asked)
        if not self.model:
            raise ValueError(f"llama.cpp does not load {self.file}.")
        self.vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
        self.context: Any = None

    def _start(self, sequences: int, length: int) -> None:
        if self.context:
            llama_cpp.llama_free(self.context)
        asked = llama_cpp.llama_context_default_params()
        asked.n_ctx = asked.n_batch = sequences * length
        asked.n_seq_max, asked.kv_unified = sequences, True
        asked.n_threads = asked.n_threads_batch = self.threads
        self.context = llama_cpp.llama_init_from_model(self.model, asked)

    def _pass(self, ids: Any, known: int, *, every: bool) -> Any:
        """[B, S or 1, V], of tokens that follow as many as are known."""
        rows, length = ids.shape
        batch = llama_cpp.llama_batch_init(rows * length, 0, 1)
        batch.n_tokens = rows * length
        for row in range(rows):
            for place in range(length):
                at = row * length + place
                batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.seq_id[at][0] = int(ids[row, place]), known + place, 1, row
                batch.logits[at] = every or place == length - 1
        code = llama_cpp.llama_decode(self.context, batch)
        llama_cpp.llama_batch_free(batch)
        if code:
            raise ValueError(f"llama_decode gives {code}.")
        wanted = range(rows * length) if every else range(length - 1, rows * length, length)
        found = [np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, at), (self.vocabulary,)) for at in wanted]
        return np.stack(found).reshape(rows, -1, self.vocabulary)

    def logits(self, ids: Any) -> Any:
        self._start(*ids.shape)
        return self._pass(ids, 0, every=True)

    def generate(self, ids: Any, new_tokens: int) -> tuple[float, float]:
        self._start(len(ids), ids.shape[1] + new_tokens)
        start = time.perf_counter()
        last = self._pass(ids, 0, every=False)[:, -1].argmax(-1)
        first = time.perf_counter()
        for known in range(ids.shape[1], ids.shape[1] + new_tokens - 1):
            last = self._pass(last[:, None], known, every=False)[:, -1].argmax(-1)
        return first - start, time.perf_counter() - first

    def files(self) -> int:
        return self.file.stat().st_size


def build(model: Path, file: Path, file_type: int, threads: int) -> None:
    """A Llama's weights in float32, without a tokenizer, then llama.cpp's own quantizer without an importance matrix."""
    plain = file.with_name("plain.gguf")
    write_plain(model, plain)
    asked = llama_cpp.llama_model_quantize_default_params()
    asked.ftype, asked.nthread = file_type, threads
    if code := llama_cpp.llama_model_quantize(str(plain).encode(), str(file).encode(), ctypes.byref(asked)):
        file.unlink(missing_ok=True)
        raise ValueError(f"llama_model_quantize gives {code}.")
    plain.unlink()


def write_plain(model: Path, file: Path) -> None:
    config, weights = json.loads((model / "config.json").read_text()), load_file(model / "model.safetensors")
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("no_vocab")
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, value in weights.items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        for projection, count in heads.items():
            if projection in name:
                value = interleaved(value, count)
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(value, np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()


def interleaved(weight: Any, heads: int) -> Any:
    """Rows of halves that are rotated together, next to each other: llama.cpp's order of a Llama's queries and keys."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def gguf_name(name: str) -> str:
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
    if name in whole:
        return whole[name]
    layer, _, part = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
    return f"blk.{layer}.{NAMES[part]}.weight"


if __name__ == "__main__":
    runtime_job.serve(LlamaCpp)
