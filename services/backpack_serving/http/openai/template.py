"""A model's chat template: messages → token ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from backpack_lm import strict_json
from backpack_lm.manifest import TOKENIZER
from backpack_lm.patch import Violation
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as HFTokenizer

from backpack_serving.errors import InvalidRequest, PreconditionFailed
from backpack_serving.http.openai.fields import ChatMessage

CONFIG, FILE = "tokenizer_config.json", "chat_template.jinja"

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


class ChatTemplate:
    """Writes chats as the model was trained on them. The template's own special tokens count as tokens.

    Messages can't smuggle those in: one that spells a special token out is refused.
    """

    def __init__(self, source: str, tokenizer: HFTokenizer, variables: dict[str, str]) -> None:
        """Raises ValueError for a template that Jinja can't read."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"its chat template can't be read: {error}") from None
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer, self._variables = tokenizer, variables
        added = tokenizer.get_added_tokens_decoder().values()
        self._special = sorted({token.content for token in added if token.special})

    @classmethod
    def read(cls, folder: Path) -> ChatTemplate | None:
        """The template of a model's folder, in tokenizer_config.json or chat_template.jinja; None if it has none.

        Raises ValueError, naming the folder, if it can't be used.
        """
        config: Any = strict_json.read(folder / CONFIG, finite=False) if (folder / CONFIG).exists() else {}
        source = config.get("chat_template")
        if isinstance(source, list):  # several by name
            source = next((each["template"] for each in source if each.get("name") == "default"), None)
        if source is None and (folder / FILE).exists():
            source = (folder / FILE).read_text("utf-8")
        if source is None:
            return None
        named = {name: config[name] for name in _SPECIAL if config.get(name)}
        variables = {name: str(value["content"] if isinstance(value, dict) else value) for name, value in named.items()}
        try:
            return cls(str(source), HFTokenizer.from_file(str(folder / TOKENIZER)), variables)
        except ValueError as error:
            raise ValueError(f"{folder} (BACKPACK_MODEL): {error}") from None

    def ids(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Token ids of a chat, up to where the model answers. Raises InvalidRequest."""
        for at, message in enumerate(messages):
            for name, text in (("role", message.role), ("content", message.text()), ("name", message.name or "")):
                if smuggled := next((token for token in self._special if token in text), None):
                    field = f"messages[{at}].{name}"
                    raise InvalidRequest.at(field, "SPECIAL_TOKEN", f"it spells out {smuggled}; leave that out")
        chat = [
            {"role": message.role, "content": message.text(), **({"name": message.name} if message.name else {})}
            for message in messages
        ]
        try:
            text = self._template.render(messages=chat, add_generation_prompt=True, **self._variables)
        except Exception as error:  # a program of others, which may refuse a chat, or fail at it
            raise InvalidRequest.of(Violation("messages", "NOT_BY_TEMPLATE", str(error))) from None
        (encoded,) = self._tokenizer.encode_batch([text], add_special_tokens=False)
        return list(encoded.ids)


def missing() -> PreconditionFailed:
    """The error of a chat with a model that has no template."""
    text = (
        f"this model has no chat template ({CONFIG} or {FILE} in its folder): it continues texts; call /v1/completions"
    )
    return PreconditionFailed("NO_CHAT_TEMPLATE", text)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
