"""A small vision Transformer on scikit-learn's digits: how many does it still tell when it is pruned, quantized, or a quarter of its size?

    python benchmarks/digits.py            # some minutes on 2 cores

A ViT of 8 × 8 images is trained from nothing on 1,347 of the 1,797 digits; 450 judge. Recipes are calibrated and distilled on the training images
without their labels. The last line on stdout is one JSON object: the accuracy of each, and how many of the 450 get the original's answer.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification

import lighten
from lighten.formats.torch_model import load_any
from lighten.model import read_spec

TRAINING = 1347
"""Images; 64 of 17 positions are a step of the distillation, as they are one of the training."""
RECIPES = {
    "pruned 80 %": "prune(admm, sparsity=0.8) | distill(logits, steps={steps}, batch_tokens=1088, learning_rate=0.001)",
    "pruned 80 %, not trained": "prune(admm, sparsity=0.8)",
    "4 bits": "quantize(gptq, bits=4, group_size=32)",
    "a quarter of its size": "shrink(width, ratio=0.5) | shrink(ffn, ratio=0.5)"
    " | distill(logits, steps={steps}, batch_tokens=1088, learning_rate=0.001)",
    "a quarter, pruned 50 %, 4 bits": "shrink(width, ratio=0.5) | shrink(ffn, ratio=0.5) | prune(admm, sparsity=0.5)"
    " | distill(logits, steps={steps}, batch_tokens=1088, learning_rate=0.001)"
    " | quantize(gptq, bits=4, group_size=32)",
}


def images() -> tuple[torch.Tensor, torch.Tensor]:
    """[1797, 1, 8, 8] from -1 to 1, and [1797] labels, in one random order."""
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    pixels = torch.from_numpy(found.images[order]).float()[:, None] / 8 - 1
    return pixels, torch.from_numpy(found.target[order])


def trained(pixels: torch.Tensor, labels: torch.Tensor, *, epochs: int) -> Any:
    """A ViT of 6 layers, by Adam with a rate that rises and falls."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=96, num_hidden_layers=6, num_attention_heads=6, intermediate_size=192,
        num_labels=10, hidden_dropout_prob=0.1,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    steps = epochs * -(-len(pixels) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(pixels)).split(64):
            loss = torch.nn.functional.cross_entropy(model(pixel_values=pixels[chosen]).logits, labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def answers(folder: Path, pixels: torch.Tensor) -> torch.Tensor:
    module = load_any(folder, read_spec(folder), dtype="float32")
    with torch.inference_mode():
        found: torch.Tensor = module(pixel_values=pixels).logits.argmax(-1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--steps", type=int, default=600, help="of distillation")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "digits.json")
    arguments = parser.parse_args()
    pixels, labels = images()
    test = slice(TRAINING, None)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        whole, text = Path(work) / "vit", Path(work) / "images.npz"
        trained(pixels[:TRAINING], labels[:TRAINING], epochs=arguments.epochs).save_pretrained(whole)
        np.savez(text, pixel_values=pixels[:TRAINING].numpy())
        before = answers(whole, pixels[test])
        size = sum(path.stat().st_size for path in whole.glob("*.safetensors"))
        rows.append({"name": "original", "accuracy": float((before == labels[test]).float().mean()), "same": 1.0, "size_share": 1.0})
        for name, recipe in RECIPES.items():
            said, folder = recipe.replace("{steps}", str(arguments.steps)), Path(work) / name.replace(" ", "-")
            made = lighten.compress(whole, said, folder, text=text)
            found = answers(folder, pixels[test])
            rows.append({
                "name": name, "recipe": said, "accuracy": float((found == labels[test]).float().mean()),
                "same": float((found == before).float().mean()), "size_share": made.size_bytes / size,
            })  # fmt: skip
            print(f"{name:32} accuracy {rows[-1]['accuracy']:.4f}  size {rows[-1]['size_share']:.3f}", file=sys.stderr, flush=True)
    print(f"{'':32} accuracy   as before   size")
    for row in rows:
        print(f"{row['name']:32} {row['accuracy']:8.4f}  {row['same']:9.4f}  {row['size_share']:5.3f}")
    arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
