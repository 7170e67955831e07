"""Our services over Connect: the same answers and errors as over gRPC."""

from __future__ import annotations

import base64
from typing import Any

import grpc
import httpx2 as httpx
import pytest
from backpack_proto.v1 import inference_pb2 as pb
from backpack_proto.v1 import inference_pb2_grpc, interventions_pb2_grpc
from backpack_proto.v1 import interventions_pb2 as ipb
from backpack_serving.client import Client
from backpack_serving.http.connect import OF_GATEWAYS, OF_INTERVENTIONS
from google.protobuf.json_format import MessageToDict, ParseDict
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from tests.http.conftest import PROMPT, Web

STATUSES = {
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
}
"""As Connect's protocol has them."""

REFUSED: list[tuple[str, str, Any, str]] = [
    ("InferenceService", "Generate", pb.GenerateRequest(), "INVALID_ARGUMENT"),
    ("InferenceService", "Generate", pb.GenerateRequest(prompt=pb.Prompt(text="a"), channel="nowhere"), "NOT_FOUND"),
    ("InferenceService", "GetModel", pb.GetModelRequest(), "UNAUTHENTICATED"),
    ("ReleaseService", "GetRelease", ipb.GetReleaseRequest(name="releases/99"), "NOT_FOUND"),
    ("ReleaseService", "Activate", ipb.ActivateRequest(channel="channels/live", release=0, etag="stale"), "ABORTED"),
    ("PatchService", "CreatePatch", ipb.CreatePatchRequest(patch_id="royal"), "ALREADY_EXISTS"),
    ("TenantService", "ListTenants", ipb.ListTenantsRequest(), "PERMISSION_DENIED"),
    (
        "InferenceService",
        "Score",
        pb.ScoreRequest(text=pb.Prompt(text=PROMPT), min_revision=pb.Position(epoch=1, revision=10**6)),
        "FAILED_PRECONDITION",
    ),
]


@pytest.mark.parametrize(("service", "method", "request_", "code"), REFUSED, ids=[each[3] for each in REFUSED])
def test_an_error_is_the_one_of_grpc(web: Web, service: str, method: str, request_: Any, code: str) -> None:
    key = "bp_nobody" if code == "UNAUTHENTICATED" else web.key
    address, module = (
        (web.gateway, inference_pb2_grpc)
        if service == "InferenceService"
        else (web.interventions, interventions_pb2_grpc)
    )
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as raised:
        getattr(getattr(module, f"{service}Stub")(channel), method)(
            request_, metadata=(("authorization", f"Bearer {key}"),)
        )
    call: Any = raised.value
    assert call.code().name == code
    status = rpc_status.from_call(call)
    assert status is not None
    answer = web.post(f"/backpack.v1.{service}/{method}", MessageToDict(request_), authorization=f"Bearer {key}")
    assert answer.status_code == STATUSES[call.code()]
    error = answer.json()
    assert (error["code"], error["message"]) == (code.lower(), status.message)
    assert reason(details(error)) == reason(list(status.details)) == answer.headers["backpack-reason"]


def test_a_search_answers_as_over_grpc(web: Web) -> None:
    asked = pb.FindSensesRequest(words=[pb.Word(text="sea")], prompts=[pb.Prompt(text=PROMPT)], page_size=3)
    answer = web.post("/backpack.v1.InferenceService/FindSenses", MessageToDict(asked))
    assert answer.status_code == 200, answer.text
    found = ParseDict(answer.json(), pb.FindSensesResponse())
    assert [word.text for word in found.words] == [" sea"]
    assert len(found.senses) == 3
    with grpc.insecure_channel(web.gateway) as channel:
        metadata = (("authorization", f"Bearer {web.key}"),)
        over_grpc = inference_pb2_grpc.InferenceServiceStub(channel).FindSenses(asked, metadata=metadata)
    assert list(found.senses) == list(over_grpc.senses)


def test_operators_see_replicas_over_connect_and_grpc_web(web: Web) -> None:
    """The same as over gRPC; gRPC-Web: a frame of five bytes before the message."""
    admin = (web.state / "admin.key").read_text().strip()
    path = "/backpack.v1.InferenceService/ListReplicas"
    listed = ParseDict(web.post(path, {}, authorization=f"Bearer {admin}").json(), pb.ListReplicasResponse())
    sent = {"authorization": f"Bearer {admin}", "content-type": "application/grpc-web+proto"}
    framed = httpx.post(web.url + path, content=bytes(5), headers=sent).content
    size = int.from_bytes(framed[1:5], "big")
    over_web = pb.ListReplicasResponse.FromString(framed[5 : 5 + size])
    with Client(web.gateway, admin) as client:
        (replica,) = client.replicas()
    for answer in (listed, over_web):
        assert [one.replica.id for one in answer.replicas] == [replica.id]
    refused = web.post(path, {})
    assert (refused.status_code, refused.headers["backpack-reason"]) == (403, "MISSING_ROLE")


def details(error: Any) -> list[Any]:
    """Connect's details, as google.rpc.Status has them."""
    status = status_pb2.Status()
    for each in error["details"]:
        value = base64.b64decode(each["value"] + "=" * (-len(each["value"]) % 4))
        status.details.add(type_url=f"type.googleapis.com/{each['type']}", value=value)
    return list(status.details)


def reason(packed: list[Any]) -> str:
    info = error_details_pb2.ErrorInfo()
    assert next(each for each in packed if each.Is(info.DESCRIPTOR)).Unpack(info)
    return str(info.reason)


def test_every_method_for_clients_has_its_path(web: Web) -> None:
    """Without a credential each refuses, and none is missing."""
    for service in (*OF_GATEWAYS, *OF_INTERVENTIONS):
        for method in service.methods:
            streams = method.client_streaming or method.server_streaming
            kind = "application/connect+json" if streams else "application/json"
            answer = web.post(f"/{service.full_name}/{method.name}", {}, authorization="", content_type=kind)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "NO_CREDENTIAL"), method.full_name


def test_parts_of_ours_are_called_by_nobody_else(web: Web) -> None:
    for path in ("SyncService/FetchRelease", "DirectoryService/Report", "InferenceService/Nothing"):
        answer = web.post(f"/backpack.v1.{path}", {})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "NO_SUCH_PATH")


def test_a_field_that_there_isnt_is_refused_by_its_name(web: Web) -> None:
    answer = web.post("/backpack.v1.InferenceService/Generate", {"prompt": {"txt": "a"}})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_argument")
    assert "txt" in answer.json()["message"]


@pytest.mark.parametrize("field", ["logitBias", "logit_bias"])
def test_one_token_has_one_bias(web: Web, field: str) -> None:
    asked: dict[str, Any] = {"prompt": {"text": "a"}, "sampling": {field: {"5": 1, "05": 2}}}
    answer = web.post("/backpack.v1.InferenceService/Generate", asked)
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_argument")
    assert "two keys name one token" in answer.json()["message"]
    asked = {"prompt": {"text": "a"}, "sampling": {"maxTokens": 1, field: {"5": 1, "50": 2}}}
    assert web.post("/backpack.v1.InferenceService/Generate", asked).status_code == 200


def test_a_forbidden_word_in_json(web: Web) -> None:
    """Its amount and its logit are −∞, which Connect writes as protobuf does, and OpenAI as −9999."""

    def call(method: str, **fields: Any) -> Any:
        answer = web.post(f"/backpack.v1.{method}", fields)
        assert answer.status_code == 200, answer.text
        return answer.json()

    call("PatchService/CreatePatch", patchId="frugal")
    edit = {"bias": {"words": [{"text": "money"}], "amount": "-Infinity"}}
    revision = call("PatchService/CreateRevision", parent="patches/frugal", edits=[edit])["revision"]
    assert revision["edits"][0]["bias"]["amount"] == "-Infinity"
    assert [word["text"] for word in revision["edits"][0]["bias"]["words"]] == [" money"]
    release = call("ReleaseService/CreateRelease", revisions=[revision["name"]])["release"]
    number = release["number"]
    asked = {"prompt": {"text": "He had some"}, "target": {"text": "money"}, "limit": 3, "release": number}
    found = call("InferenceService/Explain", **asked)
    assert found["logit"] == found["bias"] == found["target"]["logProbability"] == "-Infinity"
    echoed = web.complete(model=f"live@{number}", prompt="He had some money and", echo=True, logprobs=1, max_tokens=2)
    logs = echoed["choices"][0]["logprobs"]
    assert dict(zip(logs["tokens"], logs["token_logprobs"], strict=True))[" money"] == -9999.0
    assert logs["top_logprobs"][logs["tokens"].index(" money")][" money"] == -9999.0


def test_a_deadline_is_passed_on(web: Web) -> None:
    asked = {"prompt": {"text": PROMPT}, "sampling": {"maxTokens": 500, "ignoreEndOfText": True}}
    answer = web.post("/backpack.v1.InferenceService/Generate", asked, connect_timeout_ms="5")
    assert (answer.status_code, answer.json()["code"]) == (504, "deadline_exceeded")


def test_a_message_is_at_most_two_mebibytes(web: Web) -> None:
    asked = {"text": "a" * (2 * 2**20)}
    answer = web.post("/backpack.v1.InferenceService/Tokenize", asked)
    assert (answer.status_code, answer.json()["code"]) == (429, "resource_exhausted")
