"""What is missing is told with the command that brings it into this environment, wherever we came from."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from backpack_serving.install import install_command

FROM = [
    (None, "'backpack-serving[lab]'"),
    ({"url": "file:///srv/check%20out", "dir_info": {"editable": True}}, "-e '/srv/check out[lab]'"),
    ({"url": "file:///srv/checkout", "dir_info": {}}, "'/srv/checkout[lab]'"),
    (
        {"url": "file:///tmp/backpack_serving-0.1.0-py3-none-any.whl", "archive_info": {}},
        "'backpack-serving[lab] @ file:///tmp/backpack_serving-0.1.0-py3-none-any.whl'",
    ),
    (
        {"url": "https://example.org/r.git", "vcs_info": {"vcs": "git", "commit_id": "ab12"}},
        "'backpack-serving[lab] @ git+https://example.org/r.git@ab12'",
    ),
]


@pytest.mark.parametrize(("origin", "what"), FROM)
def test_the_command_is_of_this_environment(
    origin: dict[str, object] | None, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "backpack_serving-9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: backpack-serving\nVersion: 9\n")
    if origin is not None:
        (info / "direct_url.json").write_text(json.dumps(origin))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert install_command("lab") == f"{sys.executable} -m pip install {what}"


def test_a_checkout_and_its_environment_are_named_as_somebody_in_it_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "backpack_serving-9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: backpack-serving\nVersion: 9\n")
    (info / "direct_url.json").write_text(json.dumps({"url": tmp_path.as_uri(), "dir_info": {"editable": True}}))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    assert install_command("lab") == ".venv/bin/python -m pip install -e '.[lab]'"
