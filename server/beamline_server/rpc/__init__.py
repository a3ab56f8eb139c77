"""The gRPC face of the engine."""

import os

# Before the first import of grpc, whose core writes lines of its own onto stderr, between those of the log. Whoever
# sets the variable has the last word.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
