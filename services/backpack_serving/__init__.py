"""A server for Backpack language models: gateway, inference, interventions."""
