"""HTTP proxies that the environment names: which calls go through one, and what an error says of it.

Container engines put `http_proxy` and its kin into every container of a host that has a proxy. A proxy knows the
way out, but not the way to this machine or to the next container. So our parts never call each other through one,
and nobody calls this machine through one. Clients call other machines as gRPC does, and keys are fetched as urllib
does it.
"""

from __future__ import annotations

import os
import re
import urllib.request
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

DIRECT = ("grpc.enable_http_proxy", 0)
"""Option of a gRPC channel that goes through no proxy, whatever the environment says."""

_VARIABLES, _EXCEPTING = ("grpc_proxy", "https_proxy", "http_proxy"), ("no_grpc_proxy", "no_proxy")
"""What gRPC reads, the first that is set: in small letters only."""

_SCHEME = re.compile(r"(dns|ipv4|ipv6):(//[^/]*/)?")


class Proxy(NamedTuple):
    """A proxy, as URL or host:port and without its password, and the variable that names it."""

    address: str
    variable: str

    def __str__(self) -> str:
        return f"the proxy {self.address} ({self.variable})"


def is_here(host: str) -> bool:
    """Whether a name or an address without its port is this machine: its loopback, or the address of all of its
    interfaces, which listeners have and clients of the same settings call.
    """
    host = host.rstrip(".").lower().strip("[]")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    with suppress(ValueError):
        address = ip_address(host)
        if isinstance(address, IPv6Address) and address.ipv4_mapped:
            address = address.ipv4_mapped
        return address.is_loopback or address.is_unspecified
    return False


def stays_here(target: str) -> bool:
    """Whether all addresses of a gRPC target (host:port, dns:///host:port, ipv4:…, unix:…) are this machine."""
    return target.startswith(("unix:", "unix-abstract:", "vsock:")) or all(map(is_here, _hosts(target)))


def of_target(target: str) -> Proxy | None:
    """The proxy through which gRPC sends what a client calls there; None if it sends it directly.

    gRPC (its core, `http_proxy_mapper.cc`) reaches proxies by http only. What is excepted are ends of names, and
    ranges of addresses.
    """
    if stays_here(target):
        return None
    variable = next((name for name in _VARIABLES if name in os.environ), "")
    parts = urlsplit(os.environ.get(variable, ""))
    if parts.scheme != "http" or not parts.hostname:
        return None
    excepted = next((os.environ[name] for name in _EXCEPTING if name in os.environ), "")
    if any(_excepts(entry.strip(), _hosts(target)[0]) for entry in excepted.split(",") if entry.strip()):
        return None
    return Proxy(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}", variable)


class ProxyElsewhere(urllib.request.ProxyHandler):
    """urllib's own handler, except for what is on this machine, redirects included. `used` is the last proxy."""

    used: Proxy | None = None

    def proxy_open(self, request: Any, proxy: str, kind: str) -> Any:
        before = request.host
        if is_here(urlsplit(request.full_url).hostname or ""):
            self.used = None
            return None
        opened = super().proxy_open(request, proxy, kind)
        self.used = Proxy(request.host, f"{kind}_proxy") if request.host != before else None
        return opened


def _hosts(target: str) -> list[str]:
    """The hosts of a target, without their ports."""
    found = []
    for address in _SCHEME.sub("", unquote(target), count=1).split(","):
        host, colon, _ = address.rpartition(":")
        found.append(host if colon and (host.endswith("]") or ":" not in host) else address)
    return found


def _excepts(entry: str, host: str) -> bool:
    """Whether an entry of `no_proxy` means a host: a range of addresses, or the end of a name."""
    with suppress(ValueError):
        address: IPv4Address | IPv6Address = ip_address(host.strip("[]"))
        if address in ip_network(entry, strict=False):
            return True
    return host.lower().endswith(entry.lower())
