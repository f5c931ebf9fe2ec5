"""How long following takes, and in how much memory: Llama configs of 1 B and 400 B parameters, each in a process of its own.

    python benchmarks/trace_speed.py

Wall time counts the imports of torch and transformers; processor time stands beside it, for a machine that is busy with other work. The last line
is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time

MODELS = {
    "1B": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 8192},
    "405B": {"hidden_size": 16384, "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8, "intermediate_size": 53248},
}
"""Shapes of Llama 3.2 1B and Llama 3.1 405B, from their published configs."""
TARGETS_S = {"1B": 10, "405B": 60}


def follow(name: str, phase: str) -> None:
    """The child: follow once, print the figures."""
    from transformers import AutoConfig

    from lighten.cost.workload import Workload
    from lighten.trace.torch_model import TransformersModel

    config = AutoConfig.for_model(
        "llama", architectures=["LlamaForCausalLM"], vocab_size=128256, tie_word_embeddings=name == "1B", **MODELS[name]
    )  # fmt: skip
    optimizer = "adamw" if phase == "train" else None
    workload = Workload(phase=phase, batch_size=1, seq_len=2048, dtype="bfloat16", optimizer=optimizer)  # type: ignore[arg-type]
    program = TransformersModel(config).follow(workload)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"parameters": program.total_parameters, "peak": program.memory.peak, "rss_bytes": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        follow(*asked.child)
        return
    figures = {}
    for name in MODELS:
        for phase in ("prefill", "train"):
            before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            command = [sys.executable, __file__, "--child", name, phase]
            said = subprocess.run(
                command, check=True, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
            )
            after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
            found = json.loads(said.stdout.splitlines()[-1]) | {
                "wall_s": wall,
                "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            }
            figures[f"{name}/{phase}"] = found
            print(
                f"{name:>5} {phase:<8} {found['parameters']:>16,} parameters, peak {found['peak'] / 1e9:9.1f} GB: "
                f"{wall:5.1f} s ({found['cpu_s']:.1f} s of processor; target {TARGETS_S[name]} s), {found['rss_bytes'] / 1e9:.2f} GB resident"
            )  # fmt: skip
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
