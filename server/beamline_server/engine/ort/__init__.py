"""Computes with onnxruntime: the only package that knows it."""
