"""The wire: backpack.v1 in protobuf, and the Python code generated from it (`make protos`)."""
