"""Serves exported sequence-to-sequence Transformers over gRPC."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("beamline-serving")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0.0.0+uninstalled"
