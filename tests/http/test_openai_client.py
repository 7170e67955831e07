"""OpenAI's own Python client, unmodified."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from backpack_lm.installed import folder_of
from backpack_lm.tokenizer import Tokenizer
from backpack_serving.client import Client, Copy, Sampling, Steering

from tests.http.conftest import PROMPT, Web, chat_model, serving


@pytest.fixture(scope="session")
def client(web: Web) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{web.url}/v1", api_key=web.key, max_retries=0) as client:
        yield client


def test_channels_are_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == ("live", "harbour")
    assert client.models.retrieve("live") == model
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("nowhere")
    assert refused.value.code == "NO_SUCH_CHANNEL"
    unpatched: Any = client.models.retrieve("live@0")
    assert (unpatched.id, unpatched.release, unpatched.owned_by) == ("live@0", 0, "harbour")
    assert unpatched.release_digest != model.release_digest  # type: ignore[attr-defined]
    for name, reason in (
        ("live@99", "NO_SUCH_RELEASE"),
        ("nowhere@0", "NO_SUCH_CHANNEL"),
    ):
        with pytest.raises(openai.NotFoundError) as refused:
            client.models.retrieve(name)
        assert refused.value.code == reason


def test_a_model_is_there_if_requests_may_name_it(client: openai.OpenAI, web: Web) -> None:
    """The same refusal, word for word, where there is none."""
    with Steering(web.interventions, web.key) as steering:
        revision = steering.create_revision("royal", [Copy("king", source="doctor")])
        steering.create_release([revision])  # which gateways get ready
        deleted = steering.create_release([revision]).number
        steering.create_release([revision])
        steering.delete_release(deleted)
    for name, reason in (
        ("live@0", None),
        ("live@1", None),
        (f"live@{deleted}", "RELEASE_DELETED"),
        ("live@99", "NO_SUCH_RELEASE"),
        ("live:canary", "NO_CANARY"),
        ("live:canary@1", "NO_CANARY"),
        ("nowhere", "NO_SUCH_CHANNEL"),
        ("nowhere:canary", "NO_SUCH_CHANNEL"),
        ("nowhere@0", "NO_SUCH_CHANNEL"),
    ):
        refusals = []
        for ask in (
            lambda model: client.models.retrieve(model),
            lambda model: client.completions.create(model=model, prompt=PROMPT, max_tokens=1),
        ):
            try:
                ask(name)
                refusals.append(None)
            except openai.APIStatusError as error:
                refusals.append((error.status_code, error.code, error.body["message"]))  # type: ignore[index]
        assert refusals[0] == refusals[1], name
        assert (refusals[0] and refusals[0][1]) == reason, name


def test_a_canary_is_a_model_too(client: openai.OpenAI, web: Web) -> None:
    asked: Any = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0}
    with Steering(web.interventions, web.key) as steering:
        revision = steering.create_revision("royal", [Copy("king", source="nurse")])
        release = steering.create_release([revision]).number
        move = steering.start_canary(release, permille=1, allow_degradation=True)
        try:
            live, canary = client.models.list().data
            assert (live.id, canary.id, canary.release) == ("live", "live:canary", release)  # type: ignore[attr-defined]
            assert client.models.retrieve("live:canary") == canary
            since = {"since": str(move.at)}
            for seed in range(3):
                answer = client.completions.create(model="live:canary", seed=seed, extra_body=since, **asked)
                served: Any = answer.choices[0].served  # type: ignore[attr-defined]
                assert (answer.model, served["channel"], served["release"], served["canary"]) == (
                    "live:canary",
                    "live",
                    release,
                    True,
                )
        finally:
            move = steering.abort_canary()
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="live:canary", extra_body={"since": str(move.at)}, **asked)
    assert refused.value.code == "NO_CANARY"


def test_a_completion_is_what_grpc_gives(client: openai.OpenAI, web: Web) -> None:
    answer = client.completions.create(model="live", prompt=PROMPT, max_tokens=12, seed=3, temperature=0.7)
    with Client(web.gateway, web.key) as grpc:
        same = grpc.generate(PROMPT, Sampling(max_tokens=12, seed=3, temperature=0.7))
    assert answer.choices[0].text == same.text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 12)
    served: Any = answer.choices[0].served  # type: ignore[attr-defined]
    assert served["release_digest"] == same.served.digest
    assert (served["tenant"], served["channel"], served["release"]) == ("harbour", "live", 1)
    assert answer.system_fingerprint == f"{served['model_fingerprint'][:12]}-{served['release_digest'][:12]}"


def test_a_stream_is_the_same_text_in_parts(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="live", prompt=PROMPT, max_tokens=20, seed=3, n=2, logprobs=2)
    stream = client.completions.create(
        model="live", prompt=PROMPT, max_tokens=20, seed=3, n=2, logprobs=2, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for choice in whole.choices:
        parts = [each for chunk in chunks for each in chunk.choices if each.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + [choice.finish_reason]
        assert choice.logprobs is not None
        offsets = [at for part in parts if part.logprobs for at in part.logprobs.text_offset or ()]
        assert offsets == choice.logprobs.text_offset
    assert len({choice.text for choice in whole.choices}) == 2


def test_a_release_is_named_by_its_number(client: openai.OpenAI) -> None:
    asked: Any = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    unpatched = client.completions.create(model="live@0", **asked)
    assert unpatched.choices[0].served["release"] == 0  # type: ignore[attr-defined]
    assert unpatched.choices[0].text != client.completions.create(model="live", **asked).choices[0].text
    for name, reason in (
        ("live@99", "NO_SUCH_RELEASE"),
        ("nowhere@0", "NO_SUCH_CHANNEL"),
        ("nowhere", "NO_SUCH_CHANNEL"),
    ):
        with pytest.raises(openai.NotFoundError) as refused:
            client.completions.create(model=name, **asked)
        assert refused.value.code == reason


def test_prompts_may_be_token_ids_and_several(client: openai.OpenAI, web: Web) -> None:
    with Client(web.gateway, web.key) as grpc:
        ids = [token.id for token in grpc.tokenize(PROMPT)]
    asked: Any = {"model": "live", "max_tokens": 6, "seed": 5, "n": 2}
    texts = [choice.text for choice in client.completions.create(prompt=PROMPT, **asked).choices]
    assert [choice.text for choice in client.completions.create(prompt=ids, **asked).choices] == texts
    several = client.completions.create(prompt=[ids, ids, ids], **asked)
    assert [choice.text for choice in several.choices] == texts * 3
    assert [choice.index for choice in several.choices] == list(range(6))
    assert several.usage is not None
    assert (several.usage.prompt_tokens, several.usage.completion_tokens) == (21, 36)
    streamed = [""] * 6
    for chunk in client.completions.create(prompt=[PROMPT] * 3, stream=True, **asked):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts * 3


@pytest.mark.parametrize("most", [0, 1, 4])
def test_an_echo_has_the_prompts_log_probabilities(client: openai.OpenAI, web: Web, most: int) -> None:
    """As lm-eval asks for them."""
    answer = client.completions.create(
        model="live", prompt=PROMPT, max_tokens=most, echo=True, logprobs=1, temperature=0
    )
    (choice,) = answer.choices
    with Client(web.gateway, web.key) as grpc:
        score = grpc.score(PROMPT)
    logs = choice.logprobs
    assert logs is not None
    assert logs.tokens is not None
    assert logs.token_logprobs is not None
    assert logs.top_logprobs is not None
    assert logs.text_offset is not None
    assert len(logs.tokens) == len(score.tokens) + most
    assert logs.token_logprobs[: len(score.tokens)] == [token.log_probability for token in score.tokens]
    assert "".join(logs.tokens) == choice.text
    assert choice.text.startswith(PROMPT)
    assert [
        choice.text.index(token, at) for token, at in zip(logs.tokens, logs.text_offset, strict=True)
    ] == logs.text_offset
    assert logs.top_logprobs[0] is None
    for token, own, top in list(zip(logs.tokens, logs.token_logprobs, logs.top_logprobs, strict=True))[1:]:
        assert top[token] == own
        assert math.exp(max(top.values())) >= math.exp(own)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(score.tokens), most)


def test_a_prompts_log_probabilities_are_as_vllm_has_them(client: openai.OpenAI, web: Web) -> None:
    asked: dict[str, Any] = {"model": "live", "prompt": [PROMPT, "a"], "max_tokens": 2, "seed": 1}
    plain = client.completions.create(**asked)
    answer = client.completions.create(**asked, n=2, extra_body={"prompt_logprobs": 2})
    assert [answer.choices[n].text for n in (0, 2)] == [choice.text for choice in plain.choices]
    with Client(web.gateway, web.key) as grpc:
        prompt = grpc.generate(PROMPT, Sampling(1, prompt_log_probabilities=2)).prompt
    assert "prompt_logprobs" not in (plain.choices[0].model_extra or {})
    (one, other, alone, _) = ((choice.model_extra or {})["prompt_logprobs"] for choice in answer.choices)
    assert one == other
    assert alone == [None]
    assert one[0] is None
    for token, listed in list(zip(prompt, one, strict=True))[1:]:
        assert listed[str(token.id)]["logprob"] == token.log_probability
        assert listed[str(token.id)]["decoded_token"] == token.text
        ranks = {each["rank"]: each["logprob"] for each in listed.values()}
        assert {1, 2} <= set(ranks)
        assert ranks[1] >= ranks[2] >= ranks.get(None, -9999.0)


def test_the_likeliest_of_a_score_is_what_greedy_generation_makes(client: openai.OpenAI) -> None:
    made = client.completions.create(model="live", prompt=PROMPT, max_tokens=6, temperature=0, echo=True)
    text = made.choices[0].text
    scored = client.completions.create(model="live", prompt=text, max_tokens=0, echo=True, logprobs=1)
    logs = scored.choices[0].logprobs
    assert logs is not None
    pairs = list(zip(logs.token_logprobs or (), logs.top_logprobs or (), strict=True))[-6:]
    assert all(own == max(top.values()) for own, top in pairs)


def test_logits_are_changed_as_openai_and_vllm_say(client: openai.OpenAI, web: Web) -> None:
    def text(prompt: str = PROMPT, **asked: Any) -> str:
        answer = client.completions.create(model="live", prompt=prompt, max_tokens=12, temperature=0, **asked)
        return answer.choices[0].text

    tokenizer = Tokenizer.read(folder_of("micro") / "tokenizer.json")
    (sea,) = tokenizer.word_ids("sea")
    plain = text()
    assert text(logit_bias={str(sea): 100}) == " sea" * 12
    first = plain.split()[0]
    without = text(extra_body={"bad_words": [first]})
    assert first not in without.split()
    assert len(set(text(frequency_penalty=2).split())) > len(set(plain.split())) * 0.9
    assert text(extra_body={"repetition_penalty": 3.0}) != plain
    longer = text(extra_body={"min_tokens": 12})
    assert len(tokenizer.encode(longer)) >= 10
    with Client(web.gateway, web.key) as grpc:
        same = grpc.generate(PROMPT, Sampling(12, temperature=0, bad_words=[first]))
        assert same.text == without
    with pytest.raises(openai.BadRequestError, match="logit_bias"):
        text(logit_bias={"99999": 1})


def test_a_stop_ends_the_text_before_it(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="live", prompt=PROMPT, max_tokens=20, seed=1).choices[0].text
    stop = whole.split()[3]
    answer = client.completions.create(model="live", prompt=PROMPT, max_tokens=20, seed=1, stop=stop)
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_what_is_ours_goes_beyond(client: openai.OpenAI, web: Web) -> None:
    ours = {"explain": 2, "priority": 5, "top_k": 1, "request_key": "k"}
    answer = client.completions.create(model="live", prompt=PROMPT, max_tokens=3, extra_body=ours)
    choice: Any = answer.choices[0]
    assert [each["token"] for each in choice.explanations] == [f" {word}" for word in choice.text.split()]
    for each in choice.explanations:
        assert len(each["contributions"]) == 2
        listed = sum(term["contribution"] for term in each["contributions"])
        assert math.isclose(listed + each["unlisted"] + each["bias"], each["logit"], rel_tol=1e-5, abs_tol=1e-4)
    since = choice.served["position"]
    assert web.complete(since=since)["choices"][0]["served"]["position"] >= since
    assert web.refused(model="live", prompt=PROMPT, since="99.1")[1] == "NOT_WRITTEN"


def test_a_draft_is_tried_and_a_bad_one_refused_at_its_place(client: openai.OpenAI, web: Web) -> None:
    edit = {"copy": {"cells": [{"word": "king"}, {"word": "story"}], "source": "nurse"}}

    def complete(**ours: Any) -> Any:
        asked: Any = {"model": "live", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
        return client.completions.create(**asked, extra_body=ours).choices[0]

    plain, tried = complete(), complete(draft=[edit])
    assert tried.text != plain.text
    assert "draft_digest" not in plain.served
    with Client(web.gateway, web.key) as grpc:
        same = grpc.generate(PROMPT, Sampling(8, temperature=0), draft=[Copy(["king", "story"], "nurse")])
    assert (same.text, same.served.draft, same.served.digest) == (
        tried.text,
        tried.served["draft_digest"],
        tried.served["release_digest"],
    )
    assert complete().text == plain.text, "nothing was stored"
    for draft, param, says in (
        ([edit, {"blow": "up"}], "draft[1]", "no field named"),
        ([{"scale": {"cells": [{"word": "king"}], "factor": 1}}], "draft[0].factor", "changes nothing"),
        ([], "draft", "at least one edit"),
    ):
        with pytest.raises(openai.BadRequestError, match=says) as refused:
            complete(draft=draft)
        assert refused.value.param == param


def test_a_chat_is_written_by_the_models_template(client: openai.OpenAI, web: Web) -> None:
    messages: Any = [{"role": "user", "content": "Tell me of the king"}]
    answer = client.chat.completions.create(
        model="live", messages=messages, max_tokens=6, seed=2, logprobs=True, top_logprobs=2
    )
    with Client(web.gateway, web.key) as grpc:
        before = [token.id for token in grpc.tokenize("user: Tell me of the king")]
        after = [token.id for token in grpc.tokenize("\nassistant:")]
        end = 0
        same = grpc.generate([*before, end, *after], Sampling(max_tokens=6, seed=2))
    assert answer.choices[0].message.content == same.text
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(before) + 1 + len(after)
    logs = answer.choices[0].logprobs
    assert logs is not None
    assert logs.content is not None
    assert "".join(bytes(each.bytes or ()).decode() for each in logs.content) == same.text
    assert all(len(each.top_logprobs) == 2 for each in logs.content)
    streamed = list(client.chat.completions.create(model="live", messages=messages, max_tokens=6, seed=2, stream=True))
    assert streamed[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == same.text
    assert streamed[-1].choices[0].finish_reason == "length"


def test_a_chat_without_a_limit_fills_the_texts_that_are_served(tmp_path: Path) -> None:
    """BACKPACK_CONTEXT may be less than the model's own, which a chat asked for and was refused."""
    with serving(tmp_path, model=str(chat_model(tmp_path / "model")), context="64") as short:
        asked = {"model": "live", "messages": [{"role": "user", "content": "the king"}], "ignore_end_of_text": True}
        answer = short.post("/v1/chat/completions", asked)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["total_tokens"] == 64


def test_a_message_cant_smuggle_special_tokens_in(web: Web) -> None:
    messages = [{"role": "user", "content": "<|endoftext|>"}]
    refused = web.refused("/v1/chat/completions", model="live", messages=messages)
    assert refused == (400, "SPECIAL_TOKEN", "messages[0].content")


async def test_the_asynchronous_client_streams_many_at_once(web: Web) -> None:
    async with openai.AsyncOpenAI(base_url=f"{web.url}/v1", api_key=web.key, max_retries=0) as client:

        async def text(seed: int) -> str:
            stream = await client.completions.create(model="live", prompt=PROMPT, max_tokens=10, seed=seed, stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

        together = await asyncio.gather(*(text(seed) for seed in range(8)))
        assert list(together) == [await text(seed) for seed in range(8)]


def test_errors_are_the_clients_own(web: Web, client: openai.OpenAI) -> None:
    with openai.OpenAI(base_url=f"{web.url}/v1", api_key="nobody", max_retries=0) as nobody:
        with pytest.raises(openai.AuthenticationError) as unknown:
            nobody.models.list()
        assert unknown.value.code == "MALFORMED_KEY"
        with pytest.raises(openai.AuthenticationError):
            nobody.completions.create(model="live", prompt="x", stream=True)
    with openai.OpenAI(base_url=f"{web.url}/v1", api_key=web.caller_key, max_retries=0) as caller:
        assert caller.completions.create(model="live", prompt=PROMPT, max_tokens=1).choices
        assert [model.id for model in caller.models.list().data] == ["live"]
        pinned: Any = caller.models.retrieve("live@0")
        assert caller.completions.create(model="live@0", prompt=PROMPT, max_tokens=1).choices
        assert (pinned.id, pinned.release) == ("live@0", 0), "what completions take is there"
        draft = {"draft": [{"scale": {"cells": [{"word": {"text": "king"}}], "factor": 0}}]}
        with pytest.raises(openai.PermissionDeniedError) as forbidden:
            caller.completions.create(model="live", prompt=PROMPT, extra_body=draft)
        assert forbidden.value.code == "MISSING_ROLE"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="live", prompt="king " * 600)
    assert (long.value.code, long.value.param) == ("TOO_LONG", "prompt")
