"""The one table of settings. Every one is an environment variable BACKPACK_<NAME>, or a line of `.env`, or a file
/run/secrets/backpack_<name>, where container engines mount secrets.

The only file that reads the environment. `backpack settings` prints this table with what holds now.
"""

from __future__ import annotations

import os
import re
from functools import cached_property
from ipaddress import IPv6Address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from backpack_lm import installed, strict_json
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr
from pydantic_settings import BaseSettings, DotEnvSettingsSource, NoDecode, SettingsConfigDict

from backpack_serving.auth.keys import Holder, read_key_file
from backpack_serving.auth.tls import Tls

if TYPE_CHECKING:
    from backpack_serving.auth.oidc import Issuer

SECRETS = Path("/run/secrets")


DEFAULT_MODEL = "smollm2"
"""The model that is served where nobody says which: `backpack model list`."""


def config_folder() -> Path:
    """The user's folder of what commands keep for them, wherever they are run."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "backpack"


def model_folder(given: Path | None) -> Path:
    """The folder of a model that a command names by a folder or a name, else of the one that is served."""
    return Settings().model if given is None else installed.resolved(given)


def _check_address(text: str) -> str:
    """gRPC would take a port beyond 65535 for another one, and says of no other mistake what it is."""
    host, _, port = text.rpartition(":")
    known = host and port.isascii() and port.isdecimal() and int(port) <= LAST_PORT and not _is_ipv6(host)
    if not known and not text.startswith("unix:"):
        raise ValueError("write host:port, as in 127.0.0.1:8470 or [::]:8470")
    return text


def _is_ipv6(host: str) -> bool:
    try:
        return bool(IPv6Address(host))
    except ValueError:
        return False


def _is_thread_count(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 9 and 1 <= int(text) <= MOST_THREADS


def _metrics_address(text: str) -> str:
    return text and _check_address(text)


def _http_address(text: str) -> str:
    if text.startswith("unix:"):
        raise ValueError("write host:port, as in 127.0.0.1:8480 or [::]:8480")
    return text and _check_address(text)


def _check_gateway_processes(count: int) -> int:
    if count > 1:
        raise ValueError(
            "a gateway is one process: leave this at 1, and start more gateways (each has limits of its own) behind a "
            "TCP load balancer"
        )
    return count


def _database(text: str) -> str:
    found = _DATABASE.fullmatch(text)
    if text and (not found or int((found["port"] or ":")[1:] or 0) > LAST_PORT):
        raise ValueError("write sqlite:///PATH or postgresql://USER:PASSWORD@HOST:PORT/NAME; an @ in a password is %40")
    return text


def _json(example: str) -> BeforeValidator:
    """What isn't JSON is refused as every other value is, with its variable and the reason."""

    def read(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return strict_json.parse(value)
        except ValueError as error:
            raise ValueError(f"no JSON ({error}); write it as in {example}") from None

    return BeforeValidator(read)


def _or_none(value: Any) -> Any:
    """An empty variable names no file; as a path it would be the working directory."""
    return value or None


def secretless(text: str) -> str:
    """A setting's value without the passwords of its URLs, as people may see it."""
    return _PASSWORD_NAMED.sub(r"\1***", _PASSWORD.sub(r"\1***@", text))


def unread() -> list[str]:
    """Variables and lines of `.env` that are called like ours and that nothing reads: misspelt, perhaps."""
    ours = {f"BACKPACK_{name.upper()}" for name in Settings.model_fields} | {
        "BACKPACK_KEY",
        "BACKPACK_TENANT",
        "BACKPACK_CONTEXT_NAME",
    }  # a command's --key, --as, --context
    named = {*os.environ, *map(str.upper, DotEnvSettingsSource(Settings).env_vars)}
    return sorted(name for name in named if name.startswith("BACKPACK_") and name not in ours)


LAST_PORT = 65_535

THREADS, MOST_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_THREAD_LIMIT"), 1024

PORTS = 16
"""How many ports, from the one of a setting on, processes of a machine that share it try in turn."""


def ports_from(first: int) -> range:
    """Those ports, as far as there are any."""
    return range(first, min(first + PORTS, LAST_PORT + 1))


_DATABASE = re.compile(
    r"sqlite(\+\w+)?:///.+|postgresql(\+\w+)?://([^@]*@)?(\[[^]@]*\]|[^]\[@/?:]*)(?P<port>:\d{0,5})?(/[^?@]*)?(\?.*)?"
)
_PASSWORD = re.compile(r"(://[^:/@]*:).*@")
_PASSWORD_NAMED = re.compile(r"(\b\w*password\s*=\s*)('[^']*'?|\S*)")  # in a query, or as libpq takes them

Address = Annotated[str, AfterValidator(_check_address)]
OptionalPath = Annotated[Path | None, BeforeValidator(_or_none)]


AGES = 10.0**10
"""Seconds beyond which nothing is counted: three hundred years."""


class Settings(BaseSettings):
    """What an operator may choose."""

    model_config = SettingsConfigDict(
        env_prefix="BACKPACK_",
        env_file=".env",
        secrets_dir=SECRETS if SECRETS.is_dir() else None,
        frozen=True,
        extra="ignore",
        allow_inf_nan=False,
        str_strip_whitespace=True,  # the line end of a file that a Secret was made from, such as a database's URL
    )

    state: Path = Field(Path("var"), description="Folder of the database, keys and caches.")
    model: Annotated[Path, AfterValidator(installed.resolved)] = Field(
        default_factory=lambda: installed.folder_of(DEFAULT_MODEL),
        description="Folder of the model to serve, or a name: `backpack model list`.",
    )
    database: Annotated[str, AfterValidator(_database)] = Field(
        "", description="Database URL. Default: SQLite in the state folder."
    )
    force_model: str = Field(
        "",
        pattern="^([0-9a-f]{12,64})?$",
        description="First 12 digits, or more, of the fingerprint of a model that the intervention service shall "
        "serve although channels are at releases for another.",
    )

    gateway_address: Address = Field("127.0.0.1:8470", description="Where the gateway listens, and is called by HTTP.")
    gateway_processes: Annotated[int, AfterValidator(_check_gateway_processes)] = Field(
        0,
        ge=0,
        json_schema_extra={"maximum": 1},
        description="Processes of a gateway: 0 and 1 both mean one. For more cores, start more gateways behind a "
        "TCP load balancer.",
    )
    http_address: Annotated[str, AfterValidator(_http_address)] = Field(
        "127.0.0.1:8480", description="Where HTTP is served; empty: `backpack run` serves none."
    )
    http_origins: Annotated[frozenset[str], NoDecode, _json('["https://studio.example"]')] = Field(
        frozenset(),
        description='Origins whose pages may call over HTTP (CORS): a list such as ["https://studio.example"], or '
        '["*"] for all.',
    )
    interventions_address: Address = Field(
        "127.0.0.1:8471", description="Where the intervention service listens, and is called."
    )
    directory_address: Address = Field(
        "127.0.0.1:8472", description="Where the directory of replicas listens, and is called."
    )
    directory_application: str = Field(
        "", description="Ray Serve application that the directory is, if it is called through Serve's proxy."
    )
    inference_address: Address = Field(
        "127.0.0.1:0",
        description="Where a replica listens; port 0 takes a free one. Under Ray Serve the host is the node's, "
        "and replicas take the next free of 16 ports.",
    )
    admin_key: SecretStr = Field(
        SecretStr(""),
        description="API key with the role `admin`. Default: admin.key in the state folder.",
    )
    service_key: SecretStr = Field(
        SecretStr(""),
        description="API key with the role `replica`, for gateways and replicas. "
        "Default: replica.key in the state folder.",
    )

    slots: int = Field(32, ge=1, le=2**31, description="Sequences that a replica runs at once.")
    context: int = Field(
        0,
        ge=0,
        le=2**24,
        description="Most tokens, prompt and new ones, of a request; 0, and what is more than the model has: the "
        "model's context. Of gateways and replicas.",
    )
    cache_tokens: int = Field(
        0,
        ge=0,
        le=2**40,
        description="Tokens whose keys and values a replica holds, of all requests together. 0: 512 for each slot, "
        "or the context if that is shorter, and one whole context at least.",
    )
    queue: int = Field(256, ge=0, le=10**6, description="Requests that may wait in a replica for a slot.")
    step_tokens: int = Field(
        128,
        ge=1,
        le=10**6,
        description="Most prompt tokens that a step reads: running streams wait for no more at once.",
    )
    share_prefixes: bool = Field(
        False,
        description="Tenants reuse what was computed for each other's prompts. An answer's speed then tells "
        "that another tenant asked alike.",
    )
    overlay_rows: int = Field(
        65_536,
        ge=1,
        le=2**45,
        description="Sense vectors that the releases in use may replace together, in a replica.",
    )
    releases: int = Field(256, ge=1, le=10**6, description="Compiled releases that a replica keeps.")
    device: str = Field(
        "auto",
        pattern="^(auto|cpu|cuda)$",
        description="Where a replica computes; auto is cuda where torch finds such a device, else cpu.",
    )
    precision: str = Field(
        "auto",
        pattern="^(auto|float32|bfloat16|int8)$",
        description="Of a replica's weights, caches and sense vectors; auto is int8 on a CPU for a model that keeps "
        "its senses so, else bfloat16 where the processor multiplies it. int8, on a CPU, takes half of bfloat16's "
        "memory for weights and sense vectors; caches are bfloat16 or float32 then. In each, a request gets the same "
        "tokens in any company, on a CPU; between them they may differ.",
    )
    threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="Threads of a replica's arithmetic; 0 for torch's choice, at most one for each core that its "
        "affinity and CPU quota allow.",
    )

    ranks: int = Field(
        1,
        ge=1,
        le=1024,
        description="Processes on this machine that share a replica's model: its senses, heads and vocabulary. On CUDA "
        "one for each device. A number that doesn't divide them is refused, with those that do. Under Ray it is "
        "ignored; set tensor_parallel.",
    )

    start_wait: float = Field(
        100.0,
        ge=0,
        le=86_400,
        description="Seconds that a start waits for what isn't there yet: the database, keys, the model's files. "
        "Keep it below the startup probe, or who is waiting is killed.",
    )
    stale_after: float = Field(
        10.0,
        gt=0,
        le=AGES,
        description="Seconds without news from interventions after which a gateway's health as a reader "
        "(backpack.v1.SyncService) says so.",
    )
    expired_after: float = Field(
        86_400.0, gt=0, le=AGES, description="Seconds without news after which requests are refused."
    )
    serve_expired: Annotated[frozenset[str], NoDecode, _json('["acme"]')] = Field(
        frozenset(),
        description='Tenants that are served after that as well, with what is known: a list such as ["acme"], '
        'or ["*"] for all.',
    )
    tls_certificate: OptionalPath = Field(
        None,
        description="Certificate chain (PEM) of every listener; with it they use TLS. Read again when it changes.",
    )
    tls_key: OptionalPath = Field(None, description="Private key (PEM) of the certificate.")
    tls_client_ca: OptionalPath = Field(
        None,
        description="Authorities (PEM) of client certificates; with it, listeners take no client without one.",
    )
    tls_ca: OptionalPath = Field(
        None, description="Authorities (PEM) of the servers that are called; with it, calls use TLS."
    )
    tls_name: str = Field(
        "", description="Name that the certificates of other parts carry, where they are called by address."
    )
    jwt_issuer: str = Field(
        "", description="URL of an OpenID Connect issuer; with it, its tokens are credentials beside API keys."
    )
    jwt_audience: str = Field("", description="Audience that tokens must be made for.")
    jwt_keys: str = Field(
        "", description="Where the issuer's JWKS is, a URL or a file. Default: as its discovery document says."
    )
    jwt_tenant_claim: str = Field("tenant", description="Claim of a token that names the tenant.")
    jwt_roles_claim: str = Field("roles", description="Claim of a token that lists roles.")
    certificates: Annotated[
        dict[str, Holder], NoDecode, _json('{"gateway.example": {"tenant": "harbour", "roles": ["caller"]}}')
    ] = Field(
        {},
        description="Client certificates that are credentials: JSON, an alternative name of the certificate to "
        '{"tenant": …, "roles": […]}.',
    )
    limit_requests: float = Field(
        0, ge=0, le=10**12, description="Requests a minute that a tenant may make of a gateway; 0: any."
    )
    limit_tokens: float = Field(
        0,
        ge=0,
        le=10**12,
        description="Tokens a minute, prompt and generated, that a tenant may use of a gateway; 0: any.",
    )
    limit_concurrent: int = Field(
        0, ge=0, le=10**6, description="Requests that a tenant may run at once on a gateway; 0: any."
    )
    limits_file: OptionalPath = Field(
        None, description="TOML file of tenants with limits of their own; it is read again when it changes."
    )
    connection_age: float = Field(
        1800.0,
        ge=0.001,
        le=2_000_000,  # gRPC counts milliseconds in 31 bits
        description="Seconds after which clients are asked to connect anew, so that load spreads.",
    )
    drain: float = Field(
        30.0,
        ge=0,
        le=86_400,
        description="Seconds that calls in progress may go on after SIGTERM; then they are told to retry.",
    )
    metrics_address: Annotated[str, AfterValidator(_metrics_address)] = Field(
        "", description="Where Prometheus finds /metrics, host:port; the next free of 16 ports if it is taken."
    )
    metrics_tenants: int = Field(
        20, ge=0, le=10**5, description="Tenants with a label of their own in metrics; others are one."
    )
    retry_window: float | None = Field(
        None,
        ge=0,
        le=86_400,
        description="Seconds that commands try again where nobody answers. Default: 30, or 1 while no server has "
        "answered yet.",
    )
    degradation: float = Field(
        0.05,
        ge=0,
        allow_inf_nan=True,
        description="Share by which a release may raise the perplexity of ordinary text before channels refuse it, "
        "unless that is allowed. 0.05: 5 %; inf: releases aren't judged.",
    )
    catch_up: float = Field(
        2.0,
        ge=0,
        le=86_400,
        description="Seconds that a request with min_revision waits for its gateway to get there.",
    )
    canary_requests: int = Field(
        20, ge=1, le=10**9, description="Requests under a canary before its share of failures is judged."
    )
    canary_errors: int = Field(
        50, ge=0, le=1000, description="In a thousand: a canary ends by itself when more of its requests fail."
    )
    tenant_bytes: int = Field(
        64 * 2**20, ge=1, le=2**50, description="Bytes of compiled releases that a replica keeps for one tenant."
    )
    log_format: str = Field("console", pattern="^(console|json)$", description="console or json.")
    log_prompts: bool = Field(False, description="Write clients' prompts into the log. They are the tenants' data.")
    otel_endpoint: str = Field(
        "",
        pattern=r"^(https?://[^/\s]+\S*)?$",
        description="OTLP collector (gRPC) that gets spans, http://host:port; needs the extra `otel`.",
    )
    log_level: str = Field(
        "info", pattern="^(?i:debug|info|warning|error|critical)$", description="debug, info, warning or error."
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except UnicodeDecodeError as error:
            raise ValueError(f"{Path('.env').resolve()} or a file in {SECRETS} isn't UTF-8 text: {error}") from None

    @staticmethod
    def check_threads() -> None:
        """Raises ValueError for numbers of threads in the environment that libraries ignore, or can't make."""
        for name in THREADS:
            value = os.environ.get(name, "")
            if value and not all(_is_thread_count(one.strip()) for one in value.split(",")):
                raise ValueError(f"{name}={value}: write a number of threads from 1 to {MOST_THREADS}, or unset it")

    def key_file(self, whose: str) -> Path:
        """Where the state folder keeps a key: of the role `admin` or `replica`, or, for commands, of a tenant."""
        return self.state / f"{whose}.key"

    def key_for(self, role: str) -> str:
        """The key that this process presents as `admin` or `replica`: the setting, else the state folder's file.

        Raises FileNotFoundError, saying what makes the file, if there is neither.
        """
        given = (self.admin_key if role == "admin" else self.service_key).get_secret_value()
        if given:
            return given
        file = self.key_file(role)
        if not file.exists():
            raise FileNotFoundError(
                f"no {role} key: {file.resolve()} doesn't exist. The intervention service makes it with its first "
                f"start, in its state folder (BACKPACK_STATE); elsewhere set "
                f"BACKPACK_{'ADMIN' if role == 'admin' else 'SERVICE'}_KEY"
            )
        return read_key_file(file)

    @property
    def tls(self) -> Tls:
        """The files of TLS. Raises ValueError if a certificate has no key, or the other way round."""
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("BACKPACK_TLS_CERTIFICATE and BACKPACK_TLS_KEY go together; one of them isn't set")
        if self.tls_client_ca and not self.tls_certificate:
            raise ValueError("BACKPACK_TLS_CLIENT_CA needs BACKPACK_TLS_CERTIFICATE and BACKPACK_TLS_KEY")
        return Tls(self.tls_certificate, self.tls_key, self.tls_client_ca, self.tls_ca, self.tls_name)

    @property
    def issuer(self) -> Issuer | None:
        """Whose tokens are credentials."""
        from backpack_serving.auth.oidc import Issuer

        if not self.jwt_issuer:
            return None
        claims = self.jwt_tenant_claim, self.jwt_roles_claim
        return Issuer(self.jwt_issuer, self.jwt_audience, self.jwt_keys, *claims)

    @property
    def directory_metadata(self) -> tuple[tuple[str, str], ...]:
        """What Ray Serve's gRPC proxy needs to find the directory."""
        return (("application", self.directory_application),) if self.directory_application else ()

    @property
    def directory_tls(self) -> Tls:
        """The files of TLS for calls to the directory; none behind Serve's proxy, which knows no TLS."""
        return Tls() if self.directory_application else self.tls

    @cached_property
    def database_url(self) -> str:
        return self.database or f"sqlite:///{self.state.resolve() / 'interventions.db'}"
