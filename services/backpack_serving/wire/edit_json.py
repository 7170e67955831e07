"""Edits in protobuf's JSON, as patch files and requests over HTTP have them; a word may be a plain string."""

from __future__ import annotations

from typing import Any

from backpack_proto.v1 import edits_pb2 as pb
from google.protobuf import json_format
from google.protobuf.descriptor import Descriptor


def parse_edit_json(value: Any) -> pb.Edit:
    """The edit in a JSON value. Raises ValueError if it is none."""
    try:
        return json_format.ParseDict(_with_words(value, pb.Edit.DESCRIPTOR), pb.Edit())
    except (ValueError, TypeError, AttributeError, RecursionError, json_format.ParseError) as error:
        raise ValueError(str(error)) from None


def _with_words(values: Any, message: Descriptor) -> Any:
    """A message's JSON in which a string that stands for a `Word` is that message."""
    if isinstance(values, str) and message.full_name == pb.Word.DESCRIPTOR.full_name:
        return {"text": values}
    if not isinstance(values, dict):
        return values
    fields = {**message.fields_by_name, **message.fields_by_camelcase_name}

    def converted(name: str, value: Any) -> Any:
        kind = fields[name].message_type if name in fields else None
        if kind is None:
            return value
        return [_with_words(one, kind) for one in value] if isinstance(value, list) else _with_words(value, kind)

    return {name: converted(name, value) for name, value in values.items()}
