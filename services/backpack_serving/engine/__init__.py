"""The engine: continuous batching of steered sequences. step = schedule → run → sample → commit."""
