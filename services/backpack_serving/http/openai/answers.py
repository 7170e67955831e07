"""Parts of texts as OpenAI's answers: whole ones, and chunks of streams."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from backpack_lm.tokenizer import Detokenizer, Tokenizer
from backpack_proto.v1 import inference_pb2 as pb

from backpack_serving.http.openai.fields import Chat, Sampled
from backpack_serving.http.openai.generation import ChoicePart

Json = dict[str, Any]

_FINISH: Mapping[int, str] = {pb.FINISH_REASON_STOP: "stop", pb.FINISH_REASON_LENGTH: "length"}


class Answer:
    """Writes the answer to one request. Beyond OpenAI's fields, a choice has `served` and `explanations`."""

    def __init__(self, request: Sampled, tokenizer: Tokenizer) -> None:
        chat = isinstance(request, Chat)
        self._request, self._tokenizer, self._chat = request, tokenizer, chat
        self._kind = "chat.completion" if chat else "text_completion"
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._wanted = request.alternatives()
        self._texts: dict[int, Detokenizer] = {}
        self._lengths: dict[int, int] = {}
        self._usage = pb.Usage()

    async def whole(self, parts: AsyncIterator[ChoicePart]) -> Json:
        """All parts in one answer."""
        choices: dict[int, list[ChoicePart]] = {}
        async for part in parts:
            self._count_usage(part)
            choices.setdefault(part.choice, []).append(part)
        written = [self._whole_choice(choice, choices[choice]) for choice in sorted(choices)]
        head = self._head(self._kind, choices[0][0].served)
        prompt = self._prompt_logs(choices[0]) if self._chat else {}
        return {**head, "choices": written, **prompt, "usage": self._written_usage()}

    async def chunks(self, parts: AsyncIterator[ChoicePart]) -> AsyncIterator[Json]:
        """A chunk for each part, and at the end one with the usage, if it is asked for."""
        kind, fingerprint = "chat.completion.chunk" if self._chat else self._kind, None
        usage = {"usage": None} if self._request.usage_in_stream else {}
        begun: set[int] = set()
        async for part in parts:
            self._count_usage(part)
            fingerprint = part.served or fingerprint
            choice: Json = {"index": part.choice}
            if self._chat:
                role = {} if part.choice in begun else {"role": "assistant"}
                begun.add(part.choice)
                choice["delta"] = {**role, "content": part.text}
            else:
                choice["text"] = part.text
            choice |= self._details(part.choice, [part])
            yield {**self._head(kind, fingerprint), "choices": [choice], **usage}
        if usage:
            yield {**self._head(kind, fingerprint), "choices": [], "usage": self._written_usage()}

    def _head(self, kind: str, served: pb.Served | None) -> Json:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._request.model,
            "system_fingerprint": served and f"{served.model_fingerprint[:12]}-{served.release_digest[:12]}",
        }

    def _whole_choice(self, index: int, parts: Sequence[ChoicePart]) -> Json:
        text = "".join(part.text for part in parts)
        choice: Json = {"index": index}
        if self._chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            choice["text"] = text
            choice |= self._prompt_logs(parts)
        return choice | self._details(index, parts)

    def _prompt_logs(self, parts: Sequence[ChoicePart]) -> Json:
        """As vLLM has it: of each token of the prompt but the first its own and the likeliest ones, by their ids."""
        if self._request.prompt_logprobs is None:
            return {}
        ranked = next(part.ranked for part in parts if part.ranked)
        return {"prompt_logprobs": [None, *map(self._ranks, ranked[1:])]}

    def _ranks(self, token: pb.Token) -> Json:
        places = {other.id: place for place, other in enumerate(token.alternatives, 1)}
        return {
            str(each.id): {
                "logprob": _finite_log(each),
                "rank": places.get(each.id),
                "decoded_token": self._tokenizer.piece(each.id),
            }
            for each in (token, *token.alternatives)
        }

    def _details(self, index: int, parts: Sequence[ChoicePart]) -> Json:
        """What a choice, or a chunk of one, has besides its text."""
        details: Json = {"logprobs": None, "finish_reason": _FINISH.get(parts[-1].finish)}
        if self._wanted is not None:
            details["logprobs"] = self._chat_logs(parts) if self._chat else self._completion_logs(index, parts)
        if served := next((part.served for part in parts if part.served), None):
            details["served"] = _served(served)
        if self._request.explain:
            made = [token for part in parts if not part.prompt for token in part.tokens]
            details["explanations"] = [_explanation(token) for token in made]
        return details

    def _completion_logs(self, index: int, parts: Sequence[ChoicePart]) -> Json:
        """Completions': `text_offset` counts characters of the choice's text."""
        decoder = self._texts.setdefault(index, Detokenizer(self._tokenizer))
        logs: Json = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [] if self._wanted else None,
            "text_offset": [],
        }
        for token in (token for part in parts for token in part.tokens):
            length = self._lengths.get(index, 0)
            self._lengths[index] = length + len(decoder.add([token.id]))
            own = _finite_log(token) if token.HasField("log_probability") else None
            logs["tokens"].append(self._token_text(token.id))
            logs["token_logprobs"].append(own)
            logs["text_offset"].append(length)
            if self._wanted:
                others = {self._token_text(other.id): _finite_log(other) for other in token.alternatives}
                # The token's own last: where it is the likeliest, both are the same number to the last bit.
                logs["top_logprobs"].append(None if own is None else {**others, self._token_text(token.id): own})
        return logs

    def _chat_logs(self, parts: Sequence[ChoicePart]) -> Json:
        tokens = [token for part in parts for token in part.tokens]
        return {
            "content": [
                {**self._log(token), "top_logprobs": list(map(self._log, token.alternatives))} for token in tokens
            ]
        }

    def _log(self, token: pb.Token) -> Json:
        return {
            "token": self._token_text(token.id),
            "logprob": _finite_log(token),
            "bytes": list(self._tokenizer.token_bytes(token.id)),
        }

    def _token_text(self, token: int) -> str:
        """A token as OpenAI writes it: one that is no text by itself as its bytes."""
        data = self._tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _count_usage(self, part: ChoicePart) -> None:
        self._usage.prompt_tokens += part.usage.prompt_tokens
        self._usage.generated_tokens += part.usage.generated_tokens

    def _written_usage(self) -> Json:
        prompt, made = self._usage.prompt_tokens, self._usage.generated_tokens
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


def _served(served: pb.Served) -> Json:
    return {
        "tenant": served.tenant,
        "channel": served.channel,
        "release": served.release,
        "release_digest": served.release_digest,
        "canary": served.canary,
        **({"draft_digest": served.draft_digest} if served.draft_digest else {}),
        "position": f"{served.epoch}.{served.revision}",
        "model_fingerprint": served.model_fingerprint,
    }


def _explanation(token: pb.Token) -> Json:
    """What made a token likely: its logit is the sum of the contributions, those unlisted and the release's bias."""
    terms = token.explanation.contributions
    return {
        "token": token.text,
        "logit": _number(token.explanation.logit),
        "unlisted": _number(token.explanation.unlisted),
        "bias": _number(token.explanation.bias),
        "contributions": [
            {
                "position": term.position,
                "token": term.token.text,
                "sense": term.sense,
                "weight": _number(term.weight),
                "multiplier": _number(term.multiplier),
                "contribution": _number(term.contribution),
            }
            for term in terms
        ],
    }


def _finite_log(token: pb.Token) -> float:
    """JSON has no −∞, which is that of a word that the release forbids: OpenAI and vLLM write this instead."""
    return max(token.log_probability, -9999.0)


def _number(value: float) -> float | None:
    """JSON has no others."""
    return value if math.isfinite(value) else None
