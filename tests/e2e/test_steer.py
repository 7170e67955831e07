"""`backpack try` and `backpack steer`, as a user runs them; and what activating says of ordinary text."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from backpack_lm.installed import folder_of
from backpack_lm.ordinary_text import OrdinaryText, excerpts, plain, shipped
from backpack_lm.overlay import Overlay
from backpack_lm.patch import Cell, ReleaseContent, RevisionContent, ScaleEdit
from backpack_serving.cli.edit_text import parse_edit
from backpack_serving.client import Bias, Cells, Copy, Edit, ProjectOut, Scale, Swap, Topic
from backpack_serving.inference.served_model import ServedModel

COMMON = "scale the,of,and,to,in,a 0"
"""Makes every text worse, by far more than is allowed."""


@pytest.mark.parametrize(
    ("text", "edit"),
    [
        ("scale nurse:7 0", Scale([Cells("nurse", (7,))], 0.0)),
        (
            "scale nurse,doctor:3,8-10 -0.5",
            Scale([Cells("nurse", (3, 8, 9, 10)), Cells("doctor", (3, 8, 9, 10))], -0.5),
        ),
        ("copy king,queen ship", Copy([Cells("king"), Cells("queen")], "ship")),
        ("copy king:2 ship:5", Copy([Cells("king", (2,))], "ship", 5)),
        ("swap nurse she he", Swap([Cells("nurse")], "she", "he")),
        ("project-out nurse she", ProjectOut([Cells("nurse")], "she")),
        ("bias money,cash -5", Bias(["money", "cash"], -5.0, form="inner")),
        ("forbid money", Bias(["money"], -math.inf, form="inner")),
        ("scale ':' 0", Scale([Cells(":")], 0.0)),
        ("scale , 0", Scale([Cells(",")], 0.0)),
        ("scale ,:3 0", Scale([Cells(",", (3,))], 0.0)),
        ("scale king,#11:3 0", Scale([Cells("king", (3,)), Cells(11, (3,))], 0.0)),
        ("copy king #11:2", Copy([Cells("king")], 11, 2)),
        ("swap nurse #11 he", Swap([Cells("nurse")], 11, "he")),
        ("forbid #11,#", Bias([11, "#"], -math.inf, form="inner")),
    ],
)
def test_an_edit_is_read_as_it_is_written(text: str, edit: Edit) -> None:
    assert parse_edit(text, "inner") == edit


def test_an_edit_reaches_both_forms_of_its_words_unless_told_otherwise() -> None:
    both = Scale([Cells("he", (1,), form="both"), Cells("she", (1,), form="both")], 0.0)
    assert parse_edit("scale he,she:1 0") == both
    assert parse_edit("topic sea,ship 2") == Topic(["sea", "ship"], 2)
    with pytest.raises(ValueError, match="a topic has the first token of each word alone"):
        parse_edit("topic sea 2", any_case=True)
    assert parse_edit("scale kingdomless 0", tokens="last") == Scale([Cells("kingdomless", (), "last", "both")], 0.0)
    assert parse_edit("forbid he", any_case=True) == Bias(["he"], -math.inf, any_case=True)
    assert parse_edit("copy he she", any_case=True) == Copy([Cells("he", form="both", any_case=True)], "she")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is no edit"),
        ("blow up", "there is no kind 'blow'; write `scale nurse:7 0`, `copy king,queen ship`"),
        ("scale nurse", "write scale WORDS[:SENSES] FACTOR, such as `scale nurse:7 0`"),
        ("scale nurse:7 none", "'none' is no number"),
        ("scale nurse:x 0", "'x' names no sense; write 3 or 8,12-14"),
        ("scale nurse: 0", "'nurse:' has a colon and no senses after it"),
        ("scale nurse,,doctor 0", "'nurse,,doctor' has an empty word; a comma among others is #ID"),
        ("copy king ship:2,3", "'ship:2,3' names 2 senses to copy"),
        ("copy king ship,sea", "'ship,sea' names 2 words to copy"),
        ("topic sea 4", "'4' is no strength; it is 1, 2 or 3"),
        ("scale 'nurse 0", "No closing quotation"),
    ],
)
def test_what_is_no_edit_is_refused_with_how_it_is_written(text: str, says: str) -> None:
    with pytest.raises(ValueError, match="is no edit") as refused:
        parse_edit(text)
    assert says in str(refused.value)


def test_trying_stores_nothing_and_steering_keeps_what_was_tried(backpack: Any, tmp_path: Path) -> None:
    backpack("tenant", "create", "tries")
    words = ("--temperature", "0", "--max-tokens", "8", "--as", "tries")
    prompt = "The story of the king and the"
    tried = backpack("try", prompt, "--edit", "copy king,story nurse", "--form", "inner", "--target", "men", *words)
    assert "nothing is stored" in tried
    assert "steer NAME 'copy king,story nurse' --form inner --activate --as tries" in tried
    assert "ordinary text: perplexity" in tried
    assert backpack("patch", "list", "--as", "tries").count("\n") == 1, "the heading alone"
    file = tmp_path / "edits.json"
    file.write_text(json.dumps([{"copy": {"cells": [{"word": "king"}, {"word": "story"}], "source": "nurse"}}]))
    by_file = backpack("try", prompt, "--patch", str(file), "--target", "men", *words)
    assert by_file.split("over live")[0] == tried.split("over live")[0]

    made = backpack(
        "steer", "nurses", "copy king,story nurse", "--form", "inner", "--activate", "--wait", "all", "--as", "tries"
    )
    assert "releases/1 of nurses:1" in made
    assert "live is at release 1" in made
    assert "undo it: " in made
    steered = backpack("generate", prompt, *words).partition("\n8 ")[0].partition(prompt)[2].splitlines()[0]
    assert steered.strip() in " ".join(tried.split())


def test_commands_say_which_tokens_they_took(backpack: Any) -> None:
    backpack("tenant", "create", "forms")
    words = ("--as", "forms")
    assert "tokens: ' The', 'The'\n" in backpack("patch", "scale", "p", "The", "--factor", "0.5", *words)
    assert "tokens: ' The'\n" in backpack("patch", "scale", "p", "The", "--factor", "0.5", "--form", "inner", *words)
    made = backpack("steer", "q", "scale the 0.5", "--any-case", *words)
    assert "tokens: ' the', 'the', ' The', 'The'" in made
    never = backpack("steer", "q", "forbid The", *words)
    assert "never: ' The', 'The'" in never
    assert "2 biased tokens; ordinary text: perplexity" in never


def test_a_word_of_several_tokens_is_edited_by_those_that_are_asked_for(backpack: Any) -> None:
    words = ("--max-tokens", "2", "--no-judge", "--target", "kingdomless", "--as", "clinic")
    edit = ("try", "The king", "--edit", "scale kingdomless 0")
    refused = backpack(*edit, *words, code=1)
    assert "ask for its first token, its last or all of them: --tokens of commands that edit" in refused
    tried = backpack(*edit, "--tokens", "last", *words)
    assert "kingdomless: 2 tokens; the target is the first, ' kingdom' (8173)" in tried
    assert "steer NAME 'scale kingdomless 0' --tokens last --activate" in tried
    assert "logit of ' kingdom'" in backpack("explain", "The", "--target", "kingdomless")
    assert "senses of ' king' (2316)" in backpack("senses", "king", "--limit", "1")


def test_whose_it_is_to_change_is_never_guessed(backpack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in (
        ("patch", "scale", "p", "king", "--factor", "0"),
        ("patch", "delete", "p"),
        ("release", "create", "p:1"),
        ("release", "activate", "0"),
        ("release", "rollback"),
        ("canary", "abort"),
    ):
        refused = backpack(*words, code=1)
        assert "say whose it is to change: --as NAME (" in refused
        assert "clinic, " in refused
    monkeypatch.setenv("BACKPACK_TENANT", "harbour")
    assert "tenants/harbour/patches/p/" in backpack("patch", "scale", "p", "king", "--factor", "0")


def test_steering_adds_to_what_steers_already(backpack: Any) -> None:
    backpack("tenant", "create", "adds")
    words = ("--as", "adds")
    backpack("steer", "one", "copy king nurse", "--activate", "--wait", "all", *words)
    assert "of one:1 two:1 " in backpack("steer", "two", "copy story nurse", "--activate", "--wait", "all", *words)
    assert "of two:1 one:2 " in backpack("steer", "one", "copy king queen", *words), "in place of its old revision"
    assert "of one:2 " in backpack("steer", "one", "copy king queen", "--alone", *words)
    assert "live is at release 2" in backpack("release", "status", *words), "none of these was activated"
    backpack("canary", "start", "3", *words)
    rows = (line.split() for line in backpack("release", "list", *words).splitlines()[1:])
    standing = {row[0]: " ".join(row[4:]).partition("live")[1:] for row in rows}
    assert standing["4"] == standing["0"] == ("", "")
    assert standing["3"] == ("live", " (canary)")
    assert standing["2"] == ("live", "")
    assert standing["1"] == ("live", " (before)")
    assert "of three:1 " in backpack("steer", "three", "copy king queen", "--channel", "new", *words)
    canary = ("--channel", "live:canary", *words)
    assert "of two:1 one:2 four:1 " in backpack("steer", "four", "copy king queen", *canary)
    assert "live:canary is at release 3, of two:1 one:2: these" in backpack("steer", "one", "copy king queen", *canary)
    assert "as its canary, which this would end" in backpack(
        "steer", "one", "scale king 0", "--activate", *canary, code=1
    )
    none = backpack("steer", "four", "copy king queen", "--channel", "new:canary", *words, code=1)
    assert "the channel new has no canary; start one first" in none
    tried = backpack("try", "The king", "--edit", "copy king queen", "--no-judge", *canary)
    assert "keep it: backpack steer NAME 'copy king queen' --channel live:canary" in tried


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("try", "x", "--edit", "scale king"), "write scale WORDS[:SENSES] FACTOR"),
        (("try", "x"), "no edits: give some"),
        (("try", "x", "--edit", "scale unpronounceableness 0"), "draft.edits[0].scale.cells[0].word"),
        (("steer", "bad"), "no edits: give some"),
        (("steer", "bad", "scale king 0"), "say whose it is to change: --as NAME ("),
        (("steer", "bad", "scale unpronounceableness 0", "--as", "clinic"), "edits[0].scale.cells[0].word"),
        (("steer", "Bad!", "scale king 0", "--as", "clinic"), "BAD_NAME"),
        (("steer", "", "scale king 0", "--as", "clinic"), "'patches/' has an empty name in it"),
        (("steer", "bad", "bias king inf", "--as", "clinic"), "inf; at most ±100, or −∞ to forbid a word"),
        (("steer", "bad", "scale king:99 0", "--as", "clinic"), "sense 99 of token 2316 (' king'); senses are 0 to 7"),
        (("try", "x", "--edit", "scale king:99 0"), "sense 99 of token 2316 (' king'); senses are 0 to 7"),
    ],
)
def test_bad_edits_are_refused_and_leave_no_patch(backpack: Any, words: tuple[str, ...], says: str) -> None:
    assert says in backpack(*words, code=1)
    assert "bad" not in backpack("patch", "list", "--as", "clinic")


@pytest.mark.parametrize("command", [("steer", "q", "scale king 0"), ("release", "create", "p:1", "--activate")])
def test_a_channel_that_cannot_be_is_refused_before_anything_is_stored(backpack: Any, command: tuple[str, ...]) -> None:
    refused = backpack(*command, "--channel", "Bad!", "--as", "clinic", code=2)
    assert "names no channel; 1 to 63 of a-z, 0-9 and" in " ".join(refused.replace("│", "").split())


def test_the_edits_that_steer_already_make_nothing_anew(backpack: Any) -> None:
    backpack("tenant", "create", "again")
    words = ("--as", "again")
    backpack("steer", "one", "scale king 0.5", "--activate", "--wait", "all", *words)
    again = backpack("steer", "one", "scale king 0.5", "--activate", *words)
    assert "channels/live is at release 1, of one:1: these edits; nothing is made anew" in again
    changed = backpack("steer", "one", "scale king 0.25", *words)
    assert "one:2 takes the place of one:1" in changed
    assert "one:2 has these edits already" in backpack("steer", "one", "scale king 0.25", *words)
    backpack("steer", "two", "scale queen 0.5", "--activate", "--wait", "all", *words)
    assert "of one:1  " in backpack("steer", "one", "scale king 0.5", "--alone", *words), "which live no longer is at"
    listed = backpack("patch", "list", *words)
    assert [line.split()[:2] for line in listed.splitlines()[1:]] == [["one", "2"], ["two", "1"]]


def test_a_vector_that_cannot_be_stored_is_named_by_its_word(backpack: Any) -> None:
    edits = [word for _ in range(50) for word in ("--edit", "scale king:1 8")]
    refused = backpack("try", "The king", *edits, "--as", "clinic", code=1)
    assert "OVERFLOW: draft.edits: sense 1 of token 2316 (' king') is too large a vector to be stored" in refused
    assert "make their factors smaller" in refused


def test_what_makes_ordinary_text_worse_is_asked_about(backpack: Any, served: ServedModel) -> None:
    backpack("tenant", "create", "worse")
    words = ("--as", "worse")
    refused = backpack("steer", "gone", COMMON, "--form", "inner", "--activate", *words, code=1)
    assert "and 5.0% is the most (BACKPACK_DEGRADATION)" in refused
    assert "--yes activates it all the same" in refused
    assert "live is at release 0" in backpack("release", "status", *words)
    assert "not activated" in backpack("release", "activate", "1", *words, code=1)
    assert "not activated" in backpack("release", "create", "gone:1", "--activate", *words, code=1)
    assert "not activated" in backpack("canary", "start", "1", *words, code=1)
    assert "live is at release 1" in backpack("release", "activate", "1", "--yes", *words)
    assert "ordinary text" in backpack("release", "create", "gone:1", *words)
    assert re.search(r"%\), allowed", backpack("audit", *words))
    assert re.search(r"gone:1 .*\+\d+\.\d% +never served", backpack("release", "list", *words))
    assert "releases/3 is deleted" in backpack("release", "delete", "3", *words)
    assert "RELEASE_SERVED" in backpack("release", "delete", "1", *words, code=1)
    assert not re.search(r"^ *3 ", backpack("release", "list", *words), re.MULTILINE)
    assert "deleted" in backpack("release", "list", "--deleted", *words)

    tokens = [served.tokenizer.word_ids(word)[0] for word in ("the", "of", "and", "to", "in", "a")]
    cells = tuple(Cell(token, sense) for token in tokens for sense in range(served.manifest.config.num_senses))
    revision = RevisionContent(served.manifest.fingerprint, (ScaleEdit(cells, 0.0),))
    rows = excerpts(plain(shipped(folder_of("micro"))), served.tokenizer, served.manifest.config.n_positions)
    effects = OrdinaryText(served.model, served.table, rows).under(
        Overlay.compile(ReleaseContent((revision,)), served.table), 4
    )
    assert f"{len(cells)} cells; ordinary text: perplexity {effects.before:.2f} → {effects.after:.2f}" in refused
    assert f"moved most: {served.tokenizer.piece(effects.moved[0].token).strip()!r}" in refused


def test_what_cant_be_judged_is_activated(backpack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backpack("tenant", "create", "bound")
    assert "live is at release 1" in backpack("steer", "gone", COMMON, "--activate", "--yes", "--as", "bound")
    backpack("release", "activate", "0", "--as", "bound")
    monkeypatch.setenv("BACKPACK_GATEWAY_ADDRESS", "127.0.0.1:9")
    said = backpack("release", "activate", "1", "--as", "bound", code=1)
    assert "not judged: " in said, "by the gateway now; the service remembers"
    assert "and 5.0% is the most" in said
    assert "live is at release 1" in backpack("release", "activate", "1", "--yes", "--as", "bound")
