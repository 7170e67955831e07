"""By curl, as people try it."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
from typing import Any

import pytest
from backpack_proto.v1 import inference_pb2 as pb

from tests.http.conftest import PROMPT, Web

pytestmark = pytest.mark.skipif(not shutil.which("curl"), reason="curl isn't installed")

INFERENCE = "/backpack.v1.InferenceService"


def curl(
    web: Web, path: str, body: Any = None, *words: str, key: str | None = None, kind: str = "application/json"
) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    send = [] if body is None else ["--header", f"content-type: {kind}", "--data-binary", "@-"]
    authorization = f"Authorization: Bearer {web.key if key is None else key}"
    command = ["curl", "--silent", "--no-buffer", "--max-time", "60", "--header", authorization, *send, *words]
    done = subprocess.run([*command, web.url + path], input=data, capture_output=True, check=True)
    return done.stdout


def test_models_and_completions(web: Web) -> None:
    assert [model["id"] for model in json.loads(curl(web, "/v1/models"))["data"]] == ["live"]
    asked = {"model": "live", "prompt": PROMPT, "max_tokens": 4, "seed": 1}
    answer = json.loads(curl(web, "/v1/completions", asked))
    assert answer["choices"][0]["text"] == web.complete(max_tokens=4)["choices"][0]["text"]


def test_a_stream_is_events_that_end_in_done(web: Web) -> None:
    asked = {"model": "live", "prompt": PROMPT, "max_tokens": 20, "seed": 1, "stream": True}
    events = curl(web, "/v1/completions", asked).decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
    assert text == web.complete(max_tokens=20)["choices"][0]["text"]
    assert chunks[0]["choices"][0]["served"]["release"] == 1
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "length"


def test_the_head_of_an_answer(web: Web) -> None:
    head = curl(web, "/v1/models", None, "--include", "--header", "x-request-id: mine-1").decode()
    assert head.startswith("HTTP/1.1 200")
    assert "x-request-id: mine-1\r\n" in head
    other = curl(web, "/v1/models", None, "--include", "--header", "x-request-id: not a word").decode()
    assert "x-request-id: not" not in other
    refused = curl(web, "/v1/models", None, "--include", key="").decode()
    assert refused.startswith("HTTP/1.1 401")
    assert "www-authenticate: Bearer\r\n" in refused


def test_every_kind_of_method_is_called_with_json(web: Web) -> None:
    generated = json.loads(
        curl(web, f"{INFERENCE}/Generate", {"prompt": {"text": PROMPT}, "sampling": {"maxTokens": 4, "seed": "1"}})
    )
    assert generated["text"] == web.complete(max_tokens=4)["choices"][0]["text"]
    assert json.loads(curl(web, "/backpack.v1.ReleaseService/ListChannels", {}))["channels"][0]["release"] == "1"
    assert json.loads(curl(web, "/backpack.v1.PatchService/GetPatch", {"name": "patches/royal"}))["patch"]
    # A stream of the server.
    asked = json.dumps({"prompt": {"text": PROMPT}, "sampling": {"maxTokens": 20, "seed": "1"}}).encode()
    *messages, end = envelopes(
        curl(web, f"{INFERENCE}/GenerateStream", enveloped(asked), kind="application/connect+json")
    )
    assert [flags for flags, _ in messages] == [0] * len(messages)
    text = "".join(json.loads(message).get("text", "") for _, message in messages)
    assert text == web.complete(max_tokens=20)["choices"][0]["text"]
    assert end == (2, b"{}")
    # A stream of the client: a header, then the content.
    parts = [
        {
            "header": {
                "parent": "patches/royal",
                "kind": "EDIT_KIND_ADD",
                "size": "0",
                "packed": {"dtype": "DATA_TYPE_FLOAT32"},
            }
        },
    ]
    body = b"".join(enveloped(json.dumps(part).encode()) for part in parts)
    (error,) = envelopes(curl(web, "/backpack.v1.PatchService/UploadRevision", body, kind="application/connect+json"))
    assert json.loads(error[1])["error"]["code"] == "invalid_argument"


def test_grpc_web_is_spoken(web: Web) -> None:
    request = pb.GenerateStreamRequest(prompt=pb.Prompt(text=PROMPT), sampling=pb.Sampling(max_tokens=20, seed=1))
    body = enveloped(request.SerializeToString())
    *messages, end = envelopes(curl(web, f"{INFERENCE}/GenerateStream", body, kind="application/grpc-web+proto"))
    text = "".join(pb.GenerateStreamResponse.FromString(message).text for _, message in messages)
    assert text == web.complete(max_tokens=20)["choices"][0]["text"]
    assert end[0] == 0x80
    assert b"grpc-status: 0" in end[1].lower()


def test_grpc_itself_is_sent_to_its_own_address(web: Web) -> None:
    refused = json.loads(curl(web, f"{INFERENCE}/Generate", b"", kind="application/grpc"))
    assert refused["error"]["code"] == "NOT_HERE"


def enveloped(message: bytes) -> bytes:
    return struct.pack(">BI", 0, len(message)) + message


def envelopes(data: bytes) -> list[tuple[int, bytes]]:
    """Flags and message of each."""
    found = []
    while data:
        flags, size = struct.unpack(">BI", data[:5])
        found.append((flags, data[5 : 5 + size]))
        data = data[5 + size :]
    return found
