"""Backpack language models: the model, patches to its sense vectors, and the recipe that trains one."""
