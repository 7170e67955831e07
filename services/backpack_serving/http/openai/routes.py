"""The paths of OpenAI's API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from backpack_lm.manifest import Manifest
from backpack_lm.tokenizer import Tokenizer
from backpack_proto.v1 import inference_pb2_grpc, interventions_pb2, interventions_pb2_grpc
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Route

from backpack_serving import rpc
from backpack_serving.errors import InvalidRequest, no_canary, release_deleted
from backpack_serving.http import caller, refusals
from backpack_serving.http.calls import App
from backpack_serving.http.openai.answers import Answer
from backpack_serving.http.openai.fields import MODEL, Chat, Completion, Prompt, Sampled, read
from backpack_serving.http.openai.generation import ChoicePart, Generator
from backpack_serving.http.openai.stream import EventStream
from backpack_serving.http.openai.template import ChatTemplate, missing
from backpack_serving.references import CANARY

NAMES = {
    "/v1/models": "/openai/ListModels",
    "/v1/completions": "/openai/Completions",
    "/v1/chat/completions": "/openai/ChatCompletions",
}
"""What paths are called in metrics, logs and spans."""

RETRIEVE = ("/v1/models/", "/openai/RetrieveModel")
"""The same of a path that ends in a name."""

BODY_BYTES = rpc.SMALL
"""Most bytes of a body: what gateways take in one message."""


def routes(
    manifest: Manifest, tokenizer: Tokenizer, template: ChatTemplate | None, gateway: Any, interventions: Any
) -> list[BaseRoute]:
    """Routes that call on these channels."""
    inference = inference_pb2_grpc.InferenceServiceStub(gateway)
    releases: Any = interventions_pb2_grpc.ReleaseServiceStub(interventions)

    async def list_models(request: Request) -> JSONResponse:
        metadata = caller.metadata(request.headers)
        page = interventions_pb2.ListChannelsRequest()
        models: list[dict[str, Any]] = []
        while True:
            with rpc.errors():
                listed = await releases.ListChannels(page, metadata=metadata)
            models += [model for channel in listed.channels for model in _models(channel)]
            page.page_token = listed.next_page_token
            if not page.page_token:
                return JSONResponse({"object": "list", "data": models})

    async def retrieve_model(request: Request) -> JSONResponse:
        metadata, model = caller.metadata(request.headers), request.path_params["model"]
        named = MODEL.fullmatch(model)
        channel, number = (named["channel"], named["release"]) if named else (model, None)
        name = f"channels/{channel.removesuffix(CANARY)}"
        with rpc.errors():
            found = await releases.GetChannel(interventions_pb2.GetChannelRequest(name=name), metadata=metadata)
            known = {each["id"]: each for each in _models(found.channel)}
            if channel not in known:
                raise no_canary(found.channel.name)
            if number is None:
                return JSONResponse(known[channel])
            asked = interventions_pb2.GetReleaseRequest(name=f"releases/{int(number)}")
            release = (await releases.GetRelease(asked, metadata=metadata)).release
        if release.deleted:
            raise release_deleted(release.name)
        return JSONResponse(_model(found.channel, model, release.number, release.digest, release.create_time.seconds))

    async def completions(request: Request) -> App:
        metadata = caller.metadata(request.headers)
        asked = read(Completion, await _body(request))
        return await _answer(asked, metadata, asked.prompt)

    async def chat_completions(request: Request) -> App:
        metadata = caller.metadata(request.headers)
        asked = read(Chat, await _body(request))
        if template is None:
            raise missing()
        return await _answer(asked, metadata, [await asyncio.to_thread(template.ids, asked.messages)])

    async def _answer(asked: Sampled, metadata: caller.Metadata, prompts: list[Prompt]) -> App:
        parts = Generator(inference, manifest, tokenizer, asked, metadata).parts(prompts)
        answer = Answer(asked, tokenizer)
        if asked.stream:
            return EventStream(_chunks(answer, parts))
        return JSONResponse(await answer.whole(parts))

    return [
        Route("/v1/models", list_models),
        Route("/v1/models/{model}", retrieve_model),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
    ]


async def _chunks(answer: Answer, parts: AsyncGenerator[ChoicePart, None]) -> AsyncGenerator[dict[str, Any], None]:
    """An answer's chunks; closing them closes the calls that they come from."""
    try:
        async for chunk in answer.chunks(parts):
            yield chunk
    finally:
        await parts.aclose()


async def _body(request: Request) -> bytes:
    """The body. Raises InvalidRequest if it is no JSON by its type, or too large."""
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise InvalidRequest("NOT_JSON_TYPE", f"content-type is {kind!r}; send application/json")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > BODY_BYTES:
            raise refusals.body_too_large(BODY_BYTES)
    return bytes(body)


def _models(channel: interventions_pb2.Channel) -> Iterator[dict[str, Any]]:
    """A channel as a model, and its canary as another one, if it has one."""
    name, moved = channel.name.rpartition("/")[2], channel.update_time.seconds
    yield _model(channel, name, channel.release, channel.release_digest, moved)
    if channel.HasField("canary"):
        canary = channel.canary
        yield _model(channel, name + CANARY, canary.release, canary.release_digest, moved)


def _model(channel: interventions_pb2.Channel, name: str, release: int, digest: str, created: int) -> dict[str, Any]:
    """A release that requests get by this name. Channels are called tenants/{tenant}/channels/{name}."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": channel.name.split("/")[1],
        "release": release,
        "release_digest": digest,
    }
