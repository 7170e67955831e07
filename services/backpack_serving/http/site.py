"""The studio's files, as browsers get them: read once, and with the rules that a page of ours must keep."""

from __future__ import annotations

import gzip
import mimetypes
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

STUDIO = Path(__file__).parent / "studio"
"""What `make studio` builds from services/studio."""

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
"""Scripts and styles are files of ours, calls go to this server only, and no text can become markup."""

_GUARDS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}

_FOREVER = "public, max-age=31536000, immutable"
"""Of files whose name has a hash of their content. The page itself is asked for anew each time."""


def routes(folder: Path = STUDIO) -> list[Route]:
    """A route for each file below a folder; its index.html is at /. Raises ValueError if there is none."""
    if not (folder / "index.html").is_file():
        raise ValueError(f"{folder} has no index.html; `make studio` builds the studio")
    return [_route(folder, file) for file in sorted(folder.rglob("*")) if file.suffix in _SERVED]


_SERVED = frozenset({".html", ".js", ".css", ".svg"})


def _route(folder: Path, file: Path) -> Route:
    content = file.read_bytes()
    packed = gzip.compress(content, mtime=0)
    page = file.name == "index.html"
    kind, _ = mimetypes.guess_type(file.name)
    headers = {**_GUARDS, "cache-control": "no-cache" if page else _FOREVER, "vary": "accept-encoding"}

    async def send(request: Request) -> Response:
        if "gzip" in request.headers.get("accept-encoding", ""):
            return Response(packed, headers={**headers, "content-encoding": "gzip"}, media_type=kind)
        return Response(content, headers=headers, media_type=kind)

    return Route("/" if page else f"/{file.relative_to(folder).as_posix()}", send)
