"""Who is calling: API keys, OIDC tokens, client certificates, and the TLS files of servers and channels."""
