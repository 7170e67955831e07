"""Tokens of an issuer that serves its keys over HTTP, as identity providers do."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from backpack_serving.auth.oidc import KEEP, READ_AGAIN, Claims, Issuer, TokenVerifier
from backpack_serving.errors import Unauthenticated, Unavailable
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from tests.conftest import PROXY_VARIABLES, Clock

AUDIENCE = "backpack"

DEEP = jwt.utils.base64url_encode(b"[" * 5000).decode() + ".e30.e30"


class Provider:
    """An identity provider: a discovery document, keys, and tokens."""

    def __init__(self) -> None:
        self.keys = {"first": rsa.generate_private_key(65537, 2048)}
        self.asked = 0
        self.up = True
        self.slow = 0.0
        self.dripping, self.let_go = False, threading.Event()
        self.garbled = False
        self.host, self.moved = "127.0.0.1", ""
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                provider.asked += self.path in ("/keys", "/moved")
                time.sleep(provider.slow)
                if provider.garbled:
                    self.wfile.write(b"this is no HTTP\r\n\r\n")
                    return
                keys = f"http://{provider.host}:{provider._server.server_port}/keys"
                body = {
                    "/.well-known/openid-configuration": {"jwks_uri": keys},
                    "/keys": provider.jwks,
                    "/moved": provider.jwks,
                }.get(self.path)
                moved = provider.moved if self.path == "/keys" else ""
                self.send_response(302 if moved else 200 if body and provider.up else 503)
                self.send_header("Location", f"http://{moved}:{provider._server.server_port}/moved")
                self.end_headers()
                while provider.dripping and self.path == "/keys" and not provider.let_go.wait(0.2):
                    self.wfile.write(b" ")  # JSON so far: who waits for the end of this waits for ever
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(
            target=self._server.serve_forever, args=(0.01,), daemon=True
        ).start()  # looks as often for its end

    @property
    def jwks(self) -> dict[str, Any]:
        def public(name: str, key: Any) -> dict[str, Any]:
            if isinstance(key, rsa.RSAPrivateKey):
                values = json.loads(RSAAlgorithm.to_jwk(key.public_key())) | {"alg": "RS256"}
            else:
                values = json.loads(ECAlgorithm.to_jwk(key.public_key())) | {"alg": "ES256"}
            return {**values, "kid": name, "use": "sig"}

        secret = {"kty": "oct", "k": "c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0", "kid": "shared"}
        return {"keys": [public(*item) for item in self.keys.items()] + [secret, {"kty": "strange", "kid": "odd"}]}

    def token(self, kid: str = "first", key: Any = None, algorithm: str = "RS256", **claims: Any) -> str:
        known = {
            "iss": self.url,
            "aud": AUDIENCE,
            "sub": "someone",
            "exp": time.time() + 60,
            "tenant": "harbour",
            "roles": ["caller", "reader-of-other-things"],
        }
        told = {name: value for name, value in {**known, **claims}.items() if value is not None}
        return jwt.encode(told, key or self.keys[kid], algorithm, headers={"kid": kid})

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def provider() -> Iterator[Provider]:
    provider = Provider()
    yield provider
    provider.close()


@pytest.fixture
def tokens(provider: Provider, clock: Clock) -> TokenVerifier:
    return TokenVerifier(Issuer(provider.url, AUDIENCE), clock)


async def test_a_good_token_says_who_and_what(provider: Provider, tokens: TokenVerifier) -> None:
    for _ in range(3):
        claims = await tokens.read(provider.token())
    assert claims == Claims("someone", "harbour", ("caller", "reader-of-other-things"))
    assert (await tokens.read(provider.token(roles="caller author"))).roles == ("caller", "author")
    assert (await tokens.read(provider.token(roles=None))).roles == ()
    assert provider.asked == 1


async def test_keys_on_this_machine_are_fetched_without_a_proxy(
    provider: Provider, tokens: TokenVerifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, proxy in PROXY_VARIABLES.items():
        monkeypatch.setenv(name, proxy)
    provider.host = provider.moved = "localhost"
    assert (await tokens.read(provider.token())).tenant == "harbour"


@pytest.mark.parametrize("excepted", ["", "issuer.invalid"])
async def test_keys_elsewhere_are_fetched_as_the_environment_says_and_errors_name_the_proxy(
    monkeypatch: pytest.MonkeyPatch, excepted: str
) -> None:
    for name, proxy in PROXY_VARIABLES.items():
        monkeypatch.setenv(name, proxy.replace("//", "//me:secret@"))
    monkeypatch.setenv("no_proxy", excepted)
    with pytest.raises(OSError, match=r"\[Errno|issuer.invalid") as failed:
        await asyncio.to_thread(Issuer("https://issuer.invalid", AUDIENCE).read)
    assert ("through the proxy 127.0.0.1:1 (https_proxy)" in str(failed.value)) == (not excepted)
    assert "secret" not in str(failed.value)


async def test_claims_may_have_other_names_and_keys_lie_in_a_file(provider: Provider, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps(provider.jwks))
    issuer = Issuer(provider.url, AUDIENCE, str(file), "https://acme.example/org", "groups")
    more = {"https://acme.example/org": "clinic", "groups": ["author"]}
    assert await TokenVerifier(issuer).read(provider.token(**more)) == Claims("someone", "clinic", ("author",))
    assert provider.asked == 0


async def test_keys_that_have_moved_to_where_they_could_be_forged_are_not_read(
    provider: Provider, tokens: TokenVerifier, clock: Clock
) -> None:
    provider.moved = "0.0.0.0"
    with pytest.raises(Unavailable):
        await tokens.read(provider.token())
    assert provider.asked == 1
    provider.moved, clock.now = "localhost", READ_AGAIN + 1
    assert (await tokens.read(provider.token())).tenant == "harbour"


@pytest.mark.parametrize(
    ("how", "reason", "says"),
    [
        ({"exp": 1}, "EXPIRED_TOKEN", "ask the issuer for a new one"),
        ({"exp": None}, "BAD_TOKEN", "exp"),
        ({"aud": "another"}, "BAD_TOKEN", "[Aa]udience"),
        ({"aud": None}, "BAD_TOKEN", "aud"),
        ({"iss": "https://elsewhere.example"}, "BAD_TOKEN", "[Ii]ssuer"),
        ({"iss": "http://127"}, "BAD_TOKEN", "[Ii]ssuer"),
        ({"exp": float("inf")}, "BAD_TOKEN", "exp"),
        ({"sub": None}, "BAD_TOKEN", "sub"),
        ({"sub": "\ud800"}, "BAD_TOKEN", "half a character"),
        ({"tenant": "\ud800"}, "BAD_TOKEN", "half a character"),
        ({"nbf": time.time() + 3600}, "BAD_TOKEN", "not yet valid"),
        ({"key": rsa.generate_private_key(65537, 2048)}, "BAD_TOKEN", "Signature"),
        ({"kid": "shared", "key": "secret" * 6, "algorithm": "HS256"}, "BAD_TOKEN", "no key 'shared'"),
        ({"kid": "unknown", "key": rsa.generate_private_key(65537, 2048)}, "BAD_TOKEN", "no key 'unknown'"),
        ({"tenant": None}, "NO_TENANT", "'tenant' names no tenant"),
        ({"tenant": ["a", "b"]}, "NO_TENANT", "'tenant' names no tenant"),
        ({"roles": 3}, "BAD_ROLES", "'roles' is no list"),
    ],
    ids=lambda value: "",
)
async def test_a_bad_token_is_refused(
    provider: Provider, tokens: TokenVerifier, how: dict[str, Any], reason: str, says: str
) -> None:
    with pytest.raises(Unauthenticated, match=says) as refused:
        await tokens.read(provider.token(**how))
    assert refused.value.reason == reason


@pytest.mark.parametrize("text", ["", "x", "a.b.c", "eyJhbGciOiJub25lIn0.e30.", DEEP])
async def test_what_is_no_token_is_refused(tokens: TokenVerifier, text: str) -> None:
    with pytest.raises(Unauthenticated):
        await tokens.read(text)


async def test_a_token_without_a_signature_is_refused(provider: Provider, tokens: TokenVerifier) -> None:
    header, body, _ = provider.token().split(".")
    nothing = jwt.utils.base64url_encode(b'{"alg":"none","kid":"first"}').decode()
    for forged in (f"{nothing}.{body}.", f"{header}.{body}."):
        with pytest.raises(Unauthenticated):
            await tokens.read(forged)


async def test_new_keys_are_found_and_dropped_ones_are_forgotten(
    provider: Provider, tokens: TokenVerifier, clock: Clock
) -> None:
    old = provider.token()
    await tokens.read(old)
    provider.keys = {"second": ec.generate_private_key(ec.SECP256R1())}
    new = provider.token("second", algorithm="ES256")
    clock.now = READ_AGAIN + 1
    assert (await tokens.read(new)).tenant == "harbour"
    with pytest.raises(Unauthenticated, match="no key 'first'"):
        await tokens.read(old)


async def test_who_comes_while_the_keys_are_read_waits_for_them(
    provider: Provider, tokens: TokenVerifier, clock: Clock
) -> None:
    provider.slow = 0.2
    for asked, name in enumerate(("first", "second"), 1):  # with no keys at all, and with other ones
        provider.keys = {name: rsa.generate_private_key(65537, 2048)}
        token = provider.token(name)

        async def later(token: str = token) -> Claims:
            await asyncio.sleep(0.05)
            return await tokens.read(token)

        found = await asyncio.gather(tokens.read(token), tokens.read(token), later())
        assert {claims.tenant for claims in found} == {"harbour"}
        assert provider.asked == asked
        clock.now += READ_AGAIN + 1


async def test_who_leaves_while_the_keys_are_read_takes_them_from_nobody(
    provider: Provider, tokens: TokenVerifier, clock: Clock
) -> None:
    provider.slow = 0.2
    for name in ("first", "second"):  # with no keys at all, and with other ones
        provider.keys = {name: rsa.generate_private_key(65537, 2048)}
        leaves, stays = (asyncio.create_task(tokens.read(provider.token(name))) for _ in range(2))
        await asyncio.sleep(0.05)
        leaves.cancel()
        assert (await stays).tenant == "harbour"
        clock.now += READ_AGAIN + 1


async def test_dropped_keys_are_forgotten_without_new_ones(
    provider: Provider, tokens: TokenVerifier, clock: Clock
) -> None:
    old = provider.token()
    await tokens.read(old)
    provider.keys = {"second": ec.generate_private_key(ec.SECP256R1())}
    clock.now = KEEP + 1
    with pytest.raises(Unauthenticated, match="no key 'first'"):
        await tokens.read(old)


async def test_strangers_dont_make_us_ask_the_issuer(provider: Provider, tokens: TokenVerifier, clock: Clock) -> None:
    stranger = rsa.generate_private_key(65537, 2048)
    for second in range(11):
        clock.now = float(second)
        for name in ("a", "b"):
            with pytest.raises(Unauthenticated):
                await tokens.read(provider.token(f"{name}{second}", stranger))
    assert provider.asked == 2


async def test_known_keys_stay_good_while_the_issuer_is_away(
    provider: Provider, tokens: TokenVerifier, clock: Clock
) -> None:
    provider.up = False
    with pytest.raises(Unavailable, match="can't be had now") as refused:
        await tokens.read(provider.token())
    assert refused.value.retry_after == READ_AGAIN
    provider.up, clock.now = True, READ_AGAIN + 1
    await tokens.read(provider.token())
    provider.up, clock.now = False, 10 * KEEP
    await tokens.read(provider.token())
    provider.garbled, clock.now = True, 20 * KEEP
    await tokens.read(provider.token())


async def test_known_keys_dont_wait_for_an_issuer_that_comes_to_no_end(
    provider: Provider, tokens: TokenVerifier, clock: Clock
) -> None:
    await tokens.read(provider.token())
    provider.dripping, clock.now = True, KEEP + 1
    try:
        async with asyncio.timeout(60):
            assert (await tokens.read(provider.token())).tenant == "harbour"
        assert provider.asked == 2, "of the second answer there is only the beginning"
    finally:
        provider.let_go.set()


async def test_keys_that_could_be_forged_on_their_way_are_not_read(provider: Provider, tokens: TokenVerifier) -> None:
    provider.host = "0.0.0.0"  # another name of this machine, to those who don't know
    with pytest.raises(Unavailable):
        await tokens.read(provider.token())
    assert provider.asked == 0


@pytest.mark.parametrize(
    ("issuer", "says"),
    [
        (Issuer("https://id.example", ""), "BACKPACK_JWT_AUDIENCE isn't set"),
        (Issuer("http://id.example", AUDIENCE), "over https, or from a file"),
        (Issuer("https://id.example", AUDIENCE, "http://id.example/keys"), "over https"),
        (Issuer("id.example", AUDIENCE), "over https"),
    ],
)
def test_an_issuer_that_could_be_forged_is_refused(issuer: Issuer, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TokenVerifier(issuer)
