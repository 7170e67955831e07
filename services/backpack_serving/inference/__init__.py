"""A replica: the engine behind gRPC, and the directory that gateways find it by."""
