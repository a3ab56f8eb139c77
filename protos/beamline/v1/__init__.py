"""Beamline's public API: the generated protobuf and gRPC stubs."""
