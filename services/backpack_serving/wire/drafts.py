"""Reads drafts: edits in a request, which are tried without being stored."""

from __future__ import annotations

from backpack_lm.patch import ModelShape, PatchError, RevisionContent
from backpack_lm.tokenizer import Tokenizer
from backpack_proto.v1 import inference_pb2 as pb

from backpack_serving.errors import InvalidRequest, from_patch_error
from backpack_serving.wire.edits import read_edits


def read_draft(field: str, draft: pb.Draft, tokenizer: Tokenizer, shape: ModelShape) -> RevisionContent:
    """The revision that a draft would be; blocks. Raises InvalidRequest for edits that no revision could have, with
    their place in the request: `field` is what the draft is called there.
    """
    try:
        edits = read_edits(draft.edits, tokenizer, shape.num_senses)
    except InvalidRequest as error:
        raise error.within(field) from None
    revision = RevisionContent(shape.fingerprint, tuple(edits))
    try:
        revision.validate(shape)
    except PatchError as error:
        raise from_patch_error(error, f"{field}.") from None
    return revision
