"""The studio: its files are served under a strict policy, and they are what the sources are built into."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import httpx2 as httpx
import pytest
from backpack_serving.http import site

from tests.http.conftest import Web

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "services/studio"


def test_the_page_lets_no_foreign_script_run(web: Web) -> None:
    page = httpx.get(f"{web.url}/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(rule.partition(" ")[::2] for rule in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert {policy[kind] for kind in ("script-src", "style-src", "img-src", "connect-src")} == {"'self'"}
    assert {policy[kind] for kind in ("base-uri", "form-action", "frame-ancestors")} == {"'none'"}
    assert policy["require-trusted-types-for"] == "'script'"
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["cache-control"] == "no-cache"
    named = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert named
    assert all(re.fullmatch(r"/assets/[\w-]+\.(js|css|svg)", path) for path in named), "nothing from anywhere else"
    for path in named:
        file = httpx.get(web.url + path)
        assert file.status_code == 200
        assert file.headers["cache-control"] == "public, max-age=31536000, immutable"
        assert file.headers["x-content-type-options"] == "nosniff"
        assert file.headers["content-encoding"] == "gzip"
        assert file.content == (site.STUDIO / path[1:]).read_bytes()
        assert httpx.get(web.url + path, headers={"accept-encoding": "identity"}).content == file.content


def test_only_files_of_the_studio_are_served(web: Web) -> None:
    for path in ("/index.html", "/BUILT-FROM", "/assets", "/assets/", "/assets/../BUILT-FROM", "/assets/%2e%2e/x.js"):
        assert httpx.get(web.url + path).status_code == 404
    assert httpx.post(f"{web.url}/").status_code == 405


def test_a_folder_that_was_never_built_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no index\.html; `make studio` builds"):
        site.routes(tmp_path)


def test_the_built_files_are_of_these_sources() -> None:
    """What vite.config.ts writes into BUILT-FROM. `make studio` builds anew."""
    listed = re.search(r"SOURCES = \[(.*?)\]", (SOURCES / "vite.config.ts").read_text(), re.S)
    assert listed
    names: list[str] = []
    for name in re.findall(r'"(.+?)"', listed[1]):
        path = SOURCES / name
        below = [f"{name}/{file.relative_to(path).as_posix()}" for file in path.rglob("*") if file.is_file()]
        names += below if path.is_dir() else [name]
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(name.encode() + b"\0" + (SOURCES / name).read_bytes())
    assert (site.STUDIO / "BUILT-FROM").read_text().strip() == digest.hexdigest(), "run `make studio`"


def test_no_text_is_markup() -> None:
    """Components are given text; browsers refuse the rest (require-trusted-types-for)."""
    for file in (SOURCES / "src").rglob("*.ts*"):
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|new Function", file.read_text()
        )


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("npm"), reason="needs npm")
def test_building_again_gives_the_same_files(tmp_path: Path) -> None:
    for room in ("services/studio", "protos/typescript"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("node_modules"))
    (tmp_path / "services/backpack_serving/http").mkdir(parents=True)
    for command in ("npm ci --no-audit --no-fund", "npm run build"):
        subprocess.run(command.split(), cwd=tmp_path / "services/studio", check=True, capture_output=True, timeout=600)
    built = tmp_path / "services/backpack_serving/http/studio"
    found, kept = (
        {
            file.relative_to(folder): file.read_bytes()
            for folder in [place]
            for file in place.rglob("*")
            if file.is_file()
        }
        for place in (built, site.STUDIO)
    )
    assert found == kept
