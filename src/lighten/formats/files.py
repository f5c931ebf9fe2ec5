"""Names of the files that artifacts hold; writers and runtimes agree on them here, and neither imports the other's libraries for it."""

from __future__ import annotations

SAFETENSORS = "model.safetensors"
ONNX = "model.onnx"
OPENVINO = "openvino_model.xml"
