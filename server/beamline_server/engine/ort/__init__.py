"""Computes with onnxruntime: the only package that knows it."""

import os

# Before the first import of onnxruntime, which otherwise looks up a host of its maker's and leaves a device id in HOME.
# Its own call to turn this off comes too late. Whoever sets the variable has the last word.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
