"""OpenAI's API: models, completions and chat completions, by calls of our own services."""

from backpack_serving.http.openai.routes import NAMES, RETRIEVE, routes
from backpack_serving.http.openai.template import ChatTemplate

__all__ = ["NAMES", "RETRIEVE", "ChatTemplate", "routes"]
