"""Artifacts: Hugging Face checkpoints, DeepSeek layout, ONNX."""
