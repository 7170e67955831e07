"""Backpack language models: the model, patches to its sense vectors, and the recipe that trains one."""

import os

# Threads of torch and of the compiled library that wait for work sleep after some 50 µs. GNU's OpenMP has them
# spin: as soon as anything else runs on the machine, they keep the one that all wait for from its core.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
