"""Whose files are taken for ours."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from backpack_lm.cache import folder


def test_a_folder_that_others_may_write_to_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A library in it would run as us."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ours = folder("kernels")
    assert folder("kernels") == ours
    ours.chmod(0o1777)
    with pytest.raises(PermissionError, match="mode 1777: others may put files there"):
        folder("kernels")
    ours.chmod(0o755)
    if os.geteuid() == 0:
        os.chown(ours, 4321, 4321)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4321)
    with pytest.raises(PermissionError, match="belongs to user"):
        folder("kernels")
