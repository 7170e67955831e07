"""Messages that several rooms share ↔ domain values. What one room alone translates is in its own `wire.py`."""
