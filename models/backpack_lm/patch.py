"""What a patch to the sense vectors means: revisions, releases, their digests, and when they are allowed.

A `RevisionContent` is an immutable ordered list of edits bound to one model; a `ReleaseContent` is an immutable
ordered list of revisions.

Edits apply in order, each to what the one before it left. Two kinds are exceptions: topic edits multiply
whatever vector the other edits leave in a cell, because their multipliers come from the unedited model; biases are
added to the logits that all others lead to.

Everything here is standard library: the intervention service reads it without torch.

Errors: every refusal is a `PatchError`, which names the field, the offending value and the fix.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from backpack_lm.canonical import decode, encode
from backpack_lm.counted import counted
from backpack_lm.edits import (
    TOPIC_MULTIPLIERS,
    TOPIC_QUANTILES,
    AddEdit,
    BiasEdit,
    Cell,
    CopyEdit,
    Edit,
    PatchError,
    ProjectOutEdit,
    ScaleEdit,
    SetEdit,
    SwapEdit,
    TopicEdit,
    Vector,
    Violation,
)

__all__ = [
    "COMPOSITION_VERSION",
    "TOPIC_MULTIPLIERS",
    "TOPIC_QUANTILES",
    "AddEdit",
    "BiasEdit",
    "Cell",
    "CopyEdit",
    "Edit",
    "ModelShape",
    "PatchError",
    "PatchLimits",
    "ProjectOutEdit",
    "ReleaseContent",
    "RevisionContent",
    "ScaleEdit",
    "SetEdit",
    "SwapEdit",
    "TopicEdit",
    "Vector",
    "Violation",
    "release_digest",
    "served_digest",
]

COMPOSITION_VERSION = 1
"""Version of the composition rules above. It is part of every release digest: a release keeps its
meaning only under the rules it was made for."""

FLOAT16_MAX = 65504.0


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a patch must know of the model it is bound to.

    `sense_rms[l]` is the root mean square over the vocabulary of the norms of sense l's vectors. `spell` is the text of
    a token, for messages.
    """

    fingerprint: str
    vocab_size: int
    num_senses: int
    width: int
    sense_rms: tuple[float, ...]
    spell: Callable[[int], str] | None = field(default=None, compare=False, repr=False)

    def name(self, token: int) -> str:
        """What a token of the vocabulary is called in messages."""
        return f"token {token} ({self.spell(token)!r})" if self.spell else f"token {token}"


@dataclass(frozen=True, slots=True)
class PatchLimits:
    """Bounds on one revision or release. The defaults are the service's defaults.

    `topics` are bounded by themselves: a few bytes of one are a byte for every cell of the model in each replica.
    `biased` bounds the tokens that a revision's biases name, `bias` how far a finite one goes.
    """

    cells: int = 4096
    blob_bytes: int = 16 * 2**20
    revisions: int = 8
    norm_factor: float = 8.0
    topic_words: int = 256
    topics: int = 16
    biased: int = 4096
    bias: float = 100.0


@dataclass(frozen=True, slots=True)
class RevisionContent:
    """An immutable ordered list of edits, bound to the model with `fingerprint` (SHA-256, hex)."""

    fingerprint: str
    edits: tuple[Edit, ...]
    digest: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", hashlib.sha256(self.to_bytes()).hexdigest())

    def to_bytes(self) -> bytes:
        """The canonical bytes. Equal revisions have equal bytes, on every machine and version."""
        return encode(self.fingerprint, self.edits)

    @classmethod
    def from_bytes(cls, data: bytes) -> RevisionContent:
        """The revision whose canonical bytes are `data`. Raises PatchError if they are not that."""
        return cls(*decode(data))

    def validate(self, model: ModelShape, limits: PatchLimits = PatchLimits()) -> None:
        """Raise PatchError, listing every violation, unless this can be applied to `model`."""
        found = tuple(_violations(self, model, limits))
        if found:
            raise PatchError(*found)


@dataclass(frozen=True, slots=True)
class ReleaseContent:
    """An immutable ordered list of one tenant's revisions. No revisions is an explicit, empty release.

    A `draft` is applied after them and stored nowhere; the digest then is one that no stored release has.
    """

    revisions: tuple[RevisionContent, ...] = ()
    draft: RevisionContent | None = None
    digest: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        stored = release_digest([r.digest for r in self.revisions])
        object.__setattr__(self, "digest", served_digest(stored, self.draft.digest if self.draft else ""))

    @property
    def edits(self) -> tuple[Edit, ...]:
        return tuple(edit for revision in self._applied for edit in revision.edits)

    @property
    def _applied(self) -> tuple[RevisionContent, ...]:
        return (*self.revisions, self.draft) if self.draft else self.revisions

    def validate(self, model: ModelShape, limits: PatchLimits = PatchLimits()) -> None:
        """Raise PatchError unless every revision, and the draft, can be applied to `model`."""
        if (count := len(self._applied)) > limits.revisions:
            raise PatchError(
                Violation(
                    "revisions",
                    "TOO_MANY_REVISIONS",
                    f"{count} revisions{', the draft among them' if self.draft else ''}; at most {limits.revisions} "
                    "go into a release",
                )
            )
        for revision in self._applied:
            revision.validate(model, limits)
        if found := tuple(_all_forbidden("revisions", self.edits, model)):
            raise PatchError(*found)


def served_digest(release: str, draft: str = "") -> str:
    """What answers under a release are marked with: its digest; with a draft, whose edits as a revision have the digest
    `draft`, one of both."""
    if not draft:
        return release
    body = struct.pack("<H", COMPOSITION_VERSION) + bytes.fromhex(release) + bytes.fromhex(draft)
    return hashlib.sha256(b"backpack.draft.v1\n" + body).hexdigest()


def release_digest(revision_digests: Sequence[str]) -> str:
    """The digest of the release made of these revisions, in this order, under these rules."""
    head = struct.pack("<HI", COMPOSITION_VERSION, len(revision_digests))
    body = b"".join(bytes.fromhex(digest) for digest in revision_digests)
    return hashlib.sha256(b"backpack.release.v1\n" + head + body).hexdigest()


def _violations(revision: RevisionContent, model: ModelShape, limits: PatchLimits) -> Iterator[Violation]:
    if revision.fingerprint != model.fingerprint:
        yield Violation(
            "fingerprint",
            "WRONG_MODEL",
            f"made for model {revision.fingerprint[:12]}…, but this is {model.fingerprint[:12]}…; "
            "create the revision again from its words for this model",
        )
        return
    if not revision.edits:
        yield Violation("edits", "EMPTY", "a revision needs at least one edit")
    cells = sum(len(edit.cells) for edit in revision.edits)
    if cells > limits.cells:
        yield Violation("edits", "TOO_MANY_CELLS", f"{cells} cells, at most {limits.cells}")
    topics = sum(isinstance(edit, TopicEdit) for edit in revision.edits)
    if topics > limits.topics:
        yield Violation("edits", "TOO_MANY_TOPICS", f"{topics} topics, at most {limits.topics} go into a revision")
    biased = sum(len(edit.tokens) for edit in revision.edits if isinstance(edit, BiasEdit))
    if biased > limits.biased:
        yield Violation("edits", "TOO_MANY_WORDS", f"biases of {biased} tokens, at most {limits.biased}")
    yield from _all_forbidden("edits", revision.edits, model)
    size = len(revision.to_bytes())
    if size > limits.blob_bytes:
        yield Violation("edits", "TOO_LARGE", f"{size} bytes, at most {limits.blob_bytes}")
    for index, edit in enumerate(revision.edits):
        yield from _edit_violations(f"edits[{index}]", edit, model, limits)


def _edit_violations(at: str, edit: Edit, model: ModelShape, limits: PatchLimits) -> Iterator[Violation]:
    if isinstance(edit, TopicEdit):
        yield from _topic_violations(at, edit, model, limits)
    elif isinstance(edit, BiasEdit):
        yield from _bias_violations(at, edit, model, limits)
    elif not edit.cells:
        yield Violation(f"{at}.cells", "EMPTY", "names no cell; give a word and its senses")
    cells = list(edit.cells) + ([*map(edit.source_of, edit.cells)] if isinstance(edit, CopyEdit) else [])
    for cell in cells:
        unknown = tuple(_token_violations(f"{at}.cells", cell.token, model))
        yield from unknown
        if not 0 <= cell.sense < model.num_senses:
            token = f"token {cell.token}" if unknown else model.name(cell.token)
            yield Violation(
                f"{at}.cells",
                "BAD_SENSE_INDEX",
                f"sense {cell.sense} of {token}; senses are 0 to {model.num_senses - 1}",
            )
    if isinstance(edit, ScaleEdit):
        yield from _factor_violations(f"{at}.factor", edit.factor, limits)
    elif isinstance(edit, AddEdit):
        yield from _vector_violations(f"{at}.delta", edit.delta, edit.cells, model, limits)
        if not any(edit.delta):
            yield Violation(f"{at}.delta", "ZERO_EFFECT", "adding zeros changes nothing")
    elif isinstance(edit, SetEdit):
        yield from _vector_violations(f"{at}.vector", edit.vector, edit.cells, model, limits)
    elif isinstance(edit, CopyEdit):
        if all(edit.source_of(cell) == cell for cell in edit.cells):
            yield Violation(f"{at}.source", "ZERO_EFFECT", "copies cells onto themselves")
    elif isinstance(edit, ProjectOutEdit):
        yield from _token_violations(f"{at}.direction", edit.direction, model)
    elif isinstance(edit, SwapEdit):
        yield from _token_violations(f"{at}.old", edit.old, model)
        yield from _token_violations(f"{at}.new", edit.new, model)
        if edit.old == edit.new:
            yield Violation(f"{at}.new", "ZERO_EFFECT", "swaps a word with itself")


def _topic_violations(at: str, edit: TopicEdit, model: ModelShape, limits: PatchLimits) -> Iterator[Violation]:
    if edit.strength == 0:
        yield Violation(f"{at}.strength", "ZERO_EFFECT", "strength 0 multiplies by 1; use 1, 2 or 3")
    elif edit.strength not in TOPIC_MULTIPLIERS:
        yield Violation(f"{at}.strength", "OUT_OF_RANGE", f"{edit.strength}; use 1, 2 or 3")
    if not edit.tokens:
        yield Violation(f"{at}.words", "EMPTY", "a topic needs at least one word")
    if len(edit.tokens) > limits.topic_words:
        yield Violation(f"{at}.words", "TOO_MANY_WORDS", f"{len(edit.tokens)}, at most {limits.topic_words}")
    for token in edit.tokens:
        yield from _token_violations(f"{at}.words", token, model)


def _bias_violations(at: str, edit: BiasEdit, model: ModelShape, limits: PatchLimits) -> Iterator[Violation]:
    span = f"{edit.amount:g}; at most ±{limits.bias:g}, or −∞ to forbid a word"
    if math.isnan(edit.amount) or edit.amount == math.inf:
        yield Violation(f"{at}.amount", "NON_FINITE", span)
    elif edit.amount == 0:
        yield Violation(f"{at}.amount", "ZERO_EFFECT", "adding 0 changes nothing")
    elif math.isfinite(edit.amount) and abs(edit.amount) > limits.bias:
        yield Violation(f"{at}.amount", "OUT_OF_RANGE", span)
    if not edit.tokens:
        yield Violation(f"{at}.words", "EMPTY", "a bias needs at least one word")
    for token in edit.tokens:
        yield from _token_violations(f"{at}.words", token, model)


def _all_forbidden(at: str, edits: Sequence[Edit], model: ModelShape) -> Iterator[Violation]:
    """What forbids every token of the vocabulary; those that end a text count as any other."""
    biases = [edit for edit in edits if isinstance(edit, BiasEdit) and edit.amount == -math.inf]
    forbidden = {token for edit in biases for token in edit.tokens if token < model.vocab_size}
    if len(forbidden) == model.vocab_size:
        yield Violation(at, "NOTHING_LEFT", f"all {model.vocab_size} tokens are forbidden; leave some")


def _token_violations(at: str, token: int, model: ModelShape) -> Iterator[Violation]:
    if not 0 <= token < model.vocab_size:
        yield Violation(at, "UNKNOWN_TOKEN", f"token {token}; this model's are 0 to {model.vocab_size - 1}")


def _factor_violations(at: str, factor: float, limits: PatchLimits) -> Iterator[Violation]:
    if not math.isfinite(factor):
        yield Violation(at, "NON_FINITE", f"{factor} is not a number a vector can be scaled by")
    elif factor == 1.0:
        yield Violation(at, "ZERO_EFFECT", "scaling by 1 changes nothing")
    elif abs(factor) > limits.norm_factor:
        yield Violation(at, "OUT_OF_RANGE", f"{factor}; at most ±{limits.norm_factor:g}")


def _vector_violations(
    at: str, vector: Vector, cells: Sequence[Cell], model: ModelShape, limits: PatchLimits
) -> Iterator[Violation]:
    if len(vector) != 4 * model.width:
        yield Violation(
            at, "WRONG_WIDTH", f"{counted(len(vector) / 4, 'number')}; this model's vectors have {model.width}"
        )
        return
    values = vector.values()
    if not all(map(math.isfinite, values)):
        yield Violation(at, "NON_FINITE", "holds NaN or infinity")
        return
    if max(map(abs, values)) > FLOAT16_MAX:
        yield Violation(at, "OVERFLOW", f"holds a number beyond float16's ±{FLOAT16_MAX:g}")
        return
    senses = {cell.sense for cell in cells if 0 <= cell.sense < model.num_senses}
    if not senses:
        return  # each bad sense is a violation of its own
    tightest = min(senses, key=lambda sense: model.sense_rms[sense])
    bound = limits.norm_factor * model.sense_rms[tightest]
    if vector.norm() > bound:
        yield Violation(
            at,
            "NORM_TOO_LARGE",
            f"norm {vector.norm():.4g}; at most {bound:.4g}, "
            f"{limits.norm_factor:g} times the typical vector of sense {tightest}",
        )
