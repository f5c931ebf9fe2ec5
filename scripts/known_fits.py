"""Follow models that have no formula at a few sizes and write their polynomials to src/lighten/trace/known/, where no torch is needed.

python scripts/known_fits.py            all of KNOWN
python scripts/known_fits.py esm fnet   some of them
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from transformers import AutoConfig

from lighten.cost.workload import Workload
from lighten.errors import LightenError
from lighten.trace.fit import fit
from lighten.trace.known import FOLDER, digest, written_fit
from lighten.trace.torch_model import TransformersModel

KNOWN = {
    "fnet": "FNetForMaskedLM", "ibert": "IBertForMaskedLM", "roc_bert": "RoCBertForMaskedLM", "tapas": "TapasForMaskedLM",
    "prophetnet": "ProphetNetForConditionalGeneration", "fsmt": "FSMTForConditionalGeneration", "levit": "LevitForImageClassification",
    "hiera": "HieraForImageClassification", "mobilevit": "MobileViTForImageClassification",
}  # fmt: skip
"""model_type → class, each with the default config of its class, which is that of the first published model as a rule."""
LENGTHS, BATCHES = (1, 512), (1, 4096)


def main(wanted: list[str]) -> None:
    FOLDER.mkdir(exist_ok=True)
    for model_type in wanted or KNOWN:
        config = AutoConfig.for_model(model_type)
        model = TransformersModel(config, KNOWN[model_type])
        phase = "encode" if "encode" in model.phases else "prefill"
        fits = []
        for workload in (Workload(phase=phase), Workload(phase="train", optimizer="adamw")):  # type: ignore[arg-type]
            length = (model.fixed_len, model.fixed_len) if model.fixed_len else LENGTHS
            try:
                found = fit(model, workload, batches=BATCHES, lengths=length)
            except LightenError as error:
                print(f"{model_type} {workload.phase}: {error}", file=sys.stderr)
                continue
            fits.append({"workload": asdict(workload), "fit": written_fit(found)})
        if not fits:
            continue
        raw = config.to_dict()
        content = {"family": model.family, "architecture": KNOWN[model_type], "dtype": "float32", "fixed_len": model.fixed_len, "fits": fits}
        path = FOLDER / f"{digest(raw, KNOWN[model_type])}.json"
        path.write_text(json.dumps(content) + "\n")
        print(f"{model_type}: {path.name}, {path.stat().st_size:,} bytes", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
