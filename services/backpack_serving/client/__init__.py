"""Clients in Python, which load no torch: three that block, and three for asyncio (`AsyncClient` …).

| client | of | for |
|---|---|---|
| `Client` | a gateway | text under a tenant's releases, and what makes it so; role caller. `replicas`: role admin |
| `Steering` | the intervention service | patches, releases, channels, audit; roles author and releaser |
| `Operator` | the intervention service | tenants, keys, who is in touch; role admin |

    from backpack_serving.client import Client, Copy, Steering

    with Steering("127.0.0.1:8471", key="bp_…") as steering:
        steering.create_patch("royal", exist_ok=True)
        revision = steering.create_revision("royal", [Copy("king", source="ship")])
        release = steering.create_release([revision])
        move = steering.activate(release.number, wait="all")

    with Client("127.0.0.1:8470", key="bp_…") as client:
        for part in client.stream("How to take care of a horse:", since=move.at):
            print(part.text, end="", flush=True)

They are given an address, host:port (or `dns:///name:port`, over all of whose addresses calls are spread), and a
key: an API key, a token, or a function that gives one; none where a client certificate (`tls`) says who calls.
`timeout` is in seconds, for a whole call with all its attempts; None: none.

**Text.** Calls take `channel` (default "live"), whose release steers them, or a `release` by its number, 0 for the
model unpatched (a channel that is named all the same has to exist); `request_key`, which decides under a canary: the
same key, the same release (the channel "live:canary" is the canary's alone); and `since`, a position of the store: the
call waits a moment until its gateway knows as much, and `served.at` of each answer is one. Of a tenant's requests that
wait, those of the highest `priority` (−100 to 100) run first.

With `draft`, a list of edits, a call shows what they would do over that release, and nothing is stored:
`client.generate("The nurse said", draft=[Scale("nurse", 0)])`. `compare` takes a `Draft` in place of a release. Both
need the role author, too.

**Channels.** Every move of a channel needs the `etag` of what it was before. If none is given, the client reads it
just before; give that of the `Channel` that you decided by, and whoever moved it meanwhile isn't overruled: that
is a `Conflict`, STALE_ETAG. `wait` is for whom the answer waits, at most `wait_seconds`: the move is made in any
case, and `rollout` says how far it has come. `until_held` waits for what was made before.

**Errors.** What goes wrong is a `ServiceError`: `reason` is a stable word, the message says the value and the fix,
`retry_after` (seconds) when another try may succeed. An argument that no request can hold, or that nobody can wait
for, is InvalidRequest before anything is sent.

**Retries.** Where nobody could be reached (`Unavailable`), the client tries again for up to `retry_window` seconds
(30) after the first failure, if the timeout allows it, with growing pauses of random length: reads; writes, each
under an id that makes it one change however often it is sent; and generations of which nothing has come yet,
because half a text can't be taken back. `attempts` bounds how often; 1 is once. `unreached_window` takes the
window's place while nobody has ever answered this client, and the address may be wrong. A call that is tried for
longer than a second is reported to `notice`; by default the logger backpack_serving.client warns of it.

**Proxies.** As with all of gRPC, calls go through the proxy that `grpc_proxy`, `https_proxy` or `http_proxy`
names, unless `no_grpc_proxy` or `no_proxy` excepts the address; never to this machine. Errors say so.
"""

from backpack_lm.edits import Vector

from backpack_serving.auth.keys import Role
from backpack_serving.auth.tls import Tls
from backpack_serving.client.blocking import Client, Operator, Steering
from backpack_serving.client.channels import (
    Canary,
    Channel,
    Fleet,
    Hold,
    Move,
    Reader,
    ReplicaLoad,
    Rollout,
    Status,
    Tally,
    Wait,
)
from backpack_serving.client.edits import Add, Bias, Cells, Copy, Edit, Form, ProjectOut, Scale, Set, Swap, Topic
from backpack_serving.client.operating import AsyncOperator
from backpack_serving.client.records import (
    ApiKey,
    AuditEntry,
    Chain,
    NewKey,
    Patch,
    Release,
    ReleaseJudgement,
    Revision,
    Tenant,
)
from backpack_serving.client.requests import Draft, Sampling
from backpack_serving.client.results import (
    Contribution,
    Explained,
    Explanation,
    FoundSense,
    FoundSenses,
    Generation,
    Judgement,
    Model,
    Moved,
    Part,
    Prediction,
    Sample,
    Score,
    Sense,
    Senses,
    Served,
    Token,
)
from backpack_serving.client.steering import AsyncSteering
from backpack_serving.client.text import AsyncClient
from backpack_serving.client.words import MapAxis, MappedWord, SenseMap, UsedSense, WordUse, WordUses
from backpack_serving.errors import (
    AlreadyExists,
    Conflict,
    Exhausted,
    Expired,
    Forbidden,
    InvalidRequest,
    NotFound,
    PreconditionFailed,
    ServiceError,
    Unauthenticated,
    Unavailable,
)
from backpack_serving.references import Position

__all__ = [
    "Add",
    "AlreadyExists",
    "ApiKey",
    "AsyncClient",
    "AsyncOperator",
    "AsyncSteering",
    "AuditEntry",
    "Bias",
    "Canary",
    "Cells",
    "Chain",
    "Channel",
    "Client",
    "Conflict",
    "Contribution",
    "Copy",
    "Draft",
    "Edit",
    "Exhausted",
    "Expired",
    "Explained",
    "Explanation",
    "Fleet",
    "Forbidden",
    "Form",
    "FoundSense",
    "FoundSenses",
    "Generation",
    "Hold",
    "InvalidRequest",
    "Judgement",
    "MapAxis",
    "MappedWord",
    "Model",
    "Move",
    "Moved",
    "NewKey",
    "NotFound",
    "Operator",
    "Part",
    "Patch",
    "Position",
    "PreconditionFailed",
    "Prediction",
    "ProjectOut",
    "Reader",
    "Release",
    "ReleaseJudgement",
    "ReplicaLoad",
    "Revision",
    "Role",
    "Rollout",
    "Sample",
    "Sampling",
    "Scale",
    "Score",
    "Sense",
    "SenseMap",
    "Senses",
    "Served",
    "ServiceError",
    "Set",
    "Status",
    "Steering",
    "Swap",
    "Tally",
    "Tenant",
    "Tls",
    "Token",
    "Topic",
    "Unauthenticated",
    "Unavailable",
    "UsedSense",
    "Vector",
    "Wait",
    "WordUse",
    "WordUses",
]
