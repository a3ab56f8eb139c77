"""Exports trained PyTorch Transformers to ONNX bundles."""
