"""What client, server and export have in common: the generated protobuf and gRPC stubs (`v1`), and what a line is."""
