"""Static int8 of an encoder: lighten's own, and settings of NNCF's; how many calibration passages? What is kept, each against float32.

python benchmarks/static_int8.py --model .models/minilm --texts 128 512
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import nncf
import numpy as np
import openvino

from lighten.formats.onnx_export import export_onnx
from lighten.formats.openvino_static import quantize_static, quantize_tables
from lighten.formats.settings import openvino_settings
from lighten.formats.static_rounding import described
from lighten.judge import worker
from lighten.judge.quality import embedding_fidelity
from lighten.judge.text import load_text
from lighten.judge.tokens import Tokenizer
from lighten.model import read_spec


def settings() -> Iterator[tuple[str, dict[str, Any]]]:
    """What of NNCF's is compared, by name."""
    yield "NNCF's own for Transformers (mixed)", {}
    yield "performance (symmetric activations)", {"preset": nncf.QuantizationPreset.PERFORMANCE}
    for alpha in (0.5, -1):
        smooth = nncf.AdvancedQuantizationParameters(smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=alpha))
        yield f"mixed, SmoothQuant alpha {alpha}" if alpha >= 0 else "mixed, no SmoothQuant", {"advanced_parameters": smooth}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--texts", nargs="+", type=int, default=[128, 512], help="calibration passages")
    parser.add_argument("--seq-len", type=int, default=128)
    asked = parser.parse_args()
    nncf.set_log_level(40)
    text, core, rows = load_text(asked.text), openvino.Core(), []
    batches = list(Tokenizer(asked.model).batches(text.test, batch_size=32, length=asked.seq_len))

    def embed(model: Any) -> np.ndarray[Any, Any]:
        compiled, found = core.compile_model(model, "CPU", openvino_settings("float32", activations="static", decoder=False)), []
        for ids, mask in batches:
            hidden, weights = compiled({"input_ids": ids, "attention_mask": mask})[0], mask[..., None].astype(np.float32)
            found.append((hidden * weights).sum(1) / weights.sum(1))
        return np.concatenate(found)[: len(text.test)]

    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "model.onnx"
        export_onnx(asked.model, read_spec(asked.model), exported)
        reference = embed(core.read_model(exported))
        for count in asked.texts:
            with patch.object(worker, "CALIBRATION_TEXTS", count):
                data = worker.calibration_batches(asked.model, asked.text)
            for name, options in [("lighten's own", None), *settings()]:
                start = time.monotonic()
                if options is None:
                    model = core.read_model(exported)
                    print("\n".join(described(quantize_static(model, data))))
                    quantize_tables(model)
                else:
                    options = {"subset_size": len(data), "model_type": nncf.ModelType.TRANSFORMER, **options}
                    model = nncf.quantize(core.read_model(exported), nncf.Dataset(data), **options)
                embedded = embed(model)
                lost = float(np.square(embedded - reference).sum() / np.square(reference).sum())
                scores = {key: round(score.value, 4) for key, score in embedding_fidelity(reference, embedded).items()}
                rows.append({"texts": len(data), "setting": name, "lost_energy": lost, **scores})
                print(f"{len(data)} texts, {name}: lost energy {lost:.1e}, {scores} ({time.monotonic() - start:.0f} s)", flush=True)
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
