"""Chats as a model's template writes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from backpack_lm.installed import folder_of
from backpack_lm.tokenizer import Tokenizer
from backpack_serving.errors import InvalidRequest
from backpack_serving.http.openai.fields import ChatMessage
from backpack_serving.http.openai.template import ChatTemplate

from tests.http.conftest import TEMPLATE

END = "<|endoftext|>"
CHAT = [ChatMessage(role="system", content="Be brief"), ChatMessage(role="user", content="the king")]


def folder(tmp_path: Path, config: object = None, template: str | None = None) -> Path:
    (tmp_path / "tokenizer.json").symlink_to(folder_of("micro") / "tokenizer.json")
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (tmp_path / "chat_template.jinja").write_text(template)
    return tmp_path


@pytest.mark.parametrize(
    "config",
    [
        {"chat_template": TEMPLATE, "eos_token": END},
        {"chat_template": TEMPLATE, "eos_token": {"content": END}},
        {"chat_template": [{"name": "a"}, {"name": "default", "template": TEMPLATE}], "eos_token": END},
    ],
    ids=["plain", "token as an object", "several"],
)  # fmt: skip
def test_special_tokens_of_the_template_are_tokens(tmp_path: Path, config: object) -> None:
    template = ChatTemplate.read(folder(tmp_path, config))
    assert template is not None
    tokenizer = Tokenizer.read(folder_of("micro") / "tokenizer.json")
    ends = [tokenizer.encode(text) for text in ("system: Be brief", "\nuser: the king", "\nassistant:")]
    assert template.ids(CHAT) == [*ends[0], 0, *ends[1], 0, *ends[2]]


def test_a_template_may_be_a_file_of_its_own(tmp_path: Path) -> None:
    template = ChatTemplate.read(folder(tmp_path, template="{% for m in messages %}{{ m.content | trim }}{% endfor %}"))
    assert template is not None
    assert template.ids(CHAT) == Tokenizer.read(folder_of("micro") / "tokenizer.json").encode("Be briefthe king")


def test_a_model_without_one_has_none(tmp_path: Path) -> None:
    assert ChatTemplate.read(folder(tmp_path, {"eos_token": "x"})) is None
    assert ChatTemplate.read(folder_of("micro")) is None


def test_a_template_that_cant_be_read_is_named_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{tmp_path} \(BACKPACK_MODEL\): its chat template can't be read: "):
        ChatTemplate.read(folder(tmp_path, {"chat_template": "{% if %}"}))


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ nothing.at.all }}",
    ],
)
def test_a_chat_that_the_template_refuses_is_refused(tmp_path: Path, source: str) -> None:
    template = ChatTemplate.read(folder(tmp_path, {"chat_template": source}))
    assert template is not None
    with pytest.raises(InvalidRequest) as refused:
        template.ids(CHAT)
    assert [(v.field, v.reason) for v in refused.value.violations] == [("messages", "NOT_BY_TEMPLATE")]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "a<|endoftext|>b"},
        {"role": "<|endoftext|>", "content": "a"},
        {"role": "user", "content": "a", "name": "<|endoftext|>"},
        {"role": "user", "content": [{"type": "text", "text": "<|endof"}, {"type": "text", "text": "text|>"}]},
    ],
)
def test_a_message_that_spells_a_special_token_out_is_refused(tmp_path: Path, message: object) -> None:
    template = ChatTemplate.read(folder(tmp_path, {"chat_template": TEMPLATE}))
    assert template is not None
    with pytest.raises(InvalidRequest) as refused:
        template.ids([ChatMessage.model_validate(message)])
    assert refused.value.reason == "SPECIAL_TOKEN"
