"""The intervention service: tenants, keys, patches, revisions, releases, channels, audit. No torch, no ray."""
