"""What a first adversary of `try`, `steer` and judgements found: each did harm or misled."""

from __future__ import annotations

from typing import Any

import pytest
from backpack_serving.cli import steer

UNSERVABLE = ["scale the 8"] * 60


def test_any_case_forbids_every_case(backpack: Any) -> None:
    backpack("tenant", "create", "cases")
    made = backpack("steer", "q", "forbid the", "--any-case", "--as", "cases")
    assert "' The'" in made, made


def test_form_limits_a_bias(backpack: Any) -> None:
    backpack("tenant", "create", "biasform")
    made = backpack("steer", "q", "bias the -1", "--form", "inner", "--as", "biasform")
    assert made.splitlines()[0] == "-1 to: ' the'"


def test_hints_act_on_the_tenant_that_was_called(backpack: Any) -> None:
    backpack("tenant", "create", "hinted")
    made = backpack("steer", "q", "scale king 0.5", "--activate", "--as", "hinted")
    (undo,) = [line for line in made.splitlines() if line.startswith("undo it")]
    assert "--as hinted" in undo, undo


def test_what_try_says_to_keep_is_what_was_tried(backpack: Any) -> None:
    backpack("tenant", "create", "kept")
    words = ("--any-case", "--form", "inner", "--max-tokens", "2", "--no-judge", "--as", "kept")
    made = backpack("try", "The king", "--edit", "scale king 0.5", *words)
    (keep,) = [line for line in made.splitlines() if line.startswith("keep it")]
    assert "--any-case" in keep, keep
    assert "--form inner" in keep, keep


def test_the_undo_of_a_new_channel_works(backpack: Any) -> None:
    backpack("tenant", "create", "fresh")
    made = backpack("steer", "q", "scale king 0.5", "--activate", "--channel", "beta", "--as", "fresh")
    if "undo it" in made:
        backpack("release", "rollback", "--channel", "beta", "--as", "fresh")


def test_two_who_steer_at_once_do_not_undo_each_other(backpack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backpack("tenant", "create", "atonce")
    words = ("--activate", "--wait", "all", "--as", "atonce")
    judge = steer.judge_stored

    def meanwhile(*arguments: Any, **named: Any) -> Any:
        monkeypatch.setattr(steer, "judge_stored", judge)
        backpack("steer", "first", "scale king 0.5", *words)
        return judge(*arguments, **named)

    monkeypatch.setattr(steer, "judge_stored", meanwhile)
    assert "was moved meanwhile" in backpack("steer", "second", "scale queen 0.5", *words, code=1)
    rows = [line.split() for line in backpack("release", "list", "--as", "atonce").splitlines()[1:]]
    (live,) = [" ".join(row) for row in rows if row[-1] == "live"]
    assert "first:1" in live, live


def test_what_cannot_be_served_is_not_activated_without_a_question(backpack: Any) -> None:
    backpack("tenant", "create", "toolarge")
    said = backpack("steer", "q", *UNSERVABLE, "--as", "toolarge")
    if "can't be served" not in said:
        pytest.skip("this precision holds it")
    backpack("release", "activate", "1", "--as", "toolarge", code=1)


def test_a_release_that_cannot_be_served_is_not_the_drafts_fault(backpack: Any) -> None:
    backpack("tenant", "create", "blamed")
    said = backpack("steer", "q", *UNSERVABLE, "--as", "blamed")
    if "can't be served" not in said:
        pytest.skip("this precision holds it")
    words = ("--release", "1", "--as", "blamed")
    refused = backpack("try", "The king", "--edit", "scale king 0.5", *words, code=1)
    assert "release 1 can't be served" in refused, refused


def test_a_deleted_patch_of_the_release_neither_misleads_nor_leaves_a_revision(backpack: Any) -> None:
    backpack("tenant", "create", "deleted")
    backpack("steer", "old", "scale king 0.5", "--activate", "--wait", "all", "--as", "deleted")
    backpack("patch", "delete", "old", "--as", "deleted")
    refused = backpack("steer", "another", "scale queen 0.5", "--as", "deleted", code=1)
    assert "take another one" not in refused, refused
    assert "another" not in backpack("patch", "list", "--as", "deleted"), "nothing is left of what failed"


def test_a_canary_is_not_ended_by_steering(backpack: Any) -> None:
    backpack("tenant", "create", "ended")
    words = ("--as", "ended")
    backpack("steer", "one", "scale king 0.5", "--activate", "--wait", "all", *words)
    backpack("steer", "two", "scale queen 0.5", *words)
    backpack("canary", "start", "2", "--wait", "all", *words)
    refused = backpack("steer", "three", "scale story 0.5", "--activate", *words, code=1)
    assert "has release 2 as its canary" in refused
    assert "three" not in backpack("patch", "list", *words), "nothing is stored"
