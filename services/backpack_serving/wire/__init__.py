"""Domain ↔ messages: the only place, beside servicers' signatures, that knows protobuf."""
