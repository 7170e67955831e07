"""HTTP beside gRPC: OpenAI's API, and our own services as Connect, gRPC-Web and JSON.

It holds no key and decides nothing: each call goes on to the gateway or the intervention service with the caller's
own credential.
"""
