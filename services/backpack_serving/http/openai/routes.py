"""The paths of OpenAI's API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from backpack_lm.manifest import Manifest
from backpack_lm.tokenizer import Tokenizer
from backpack_proto.v1 import inference_pb2_grpc, interventions_pb2, interventions_pb2_grpc
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Route

from backpack_serving import rpc
from backpack_serving.errors import InvalidRequest
from backpack_serving.http import caller, refusals
from backpack_serving.http.calls import App
from backpack_serving.http.openai.answers import Answer
from backpack_serving.http.openai.fields import Chat, Completion, Prompt, Sampled, read
from backpack_serving.http.openai.generation import ChoicePart, Generator
from backpack_serving.http.openai.stream import EventStream
from backpack_serving.http.openai.template import ChatTemplate, missing

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
            models += map(_model, listed.channels)
            page.page_token = listed.next_page_token
            if not page.page_token:
                return JSONResponse({"object": "list", "data": models})

    async def retrieve_model(request: Request) -> JSONResponse:
        metadata = caller.metadata(request.headers)
        name = f"channels/{request.path_params['model']}"
        with rpc.errors():
            found = await releases.GetChannel(interventions_pb2.GetChannelRequest(name=name), metadata=metadata)
        return JSONResponse(_model(found.channel))

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


def _model(channel: interventions_pb2.Channel) -> dict[str, Any]:
    """A channel as a model: tenants/{tenant}/channels/{name}."""
    _, tenant, _, name = channel.name.split("/")
    return {
        "id": name,
        "object": "model",
        "created": channel.update_time.seconds,
        "owned_by": tenant,
        "release": channel.release,
        "release_digest": channel.release_digest,
    }
