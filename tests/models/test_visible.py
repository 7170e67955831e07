"""Texts of others, as people are shown them."""

from __future__ import annotations

import sys
import unicodedata

import pytest
from backpack_lm.reports.generation import GenerationPage, TokenStep
from backpack_lm.reports.report import Report, Table
from backpack_lm.reports.word import SensePage, WordPage
from backpack_lm.visible import visible

HIDDEN = "\x1b\x9b\x7f\r\x00\u202e\u2066\u200b\u200f\u2028\u2029\u00ad\ufeff\u061c\u206a\ufff9\U000e0041\ud800"


@pytest.mark.parametrize(
    "text",
    [
        "plain, ünïcode\twith\ntwo lines and a\u00a0space\u3000",
        "می‌خواهم",  # Persian: a joiner between letters
        "👩‍👩‍👧 ❤️ 👍🏽",  # a family is three people and two joiners
        "क्‍ष",
        "۝ ؀١",  # Arabic's signs are format characters with a shape
        "\u200d👧",  # the rest of a family, in a later part of a stream
        "\ue000 private, and perhaps a letter of a newer Unicode: \U0001fae8\u0378",
    ],
)
def test_what_people_write_stays(text: str) -> None:
    assert visible(text) == text


@pytest.mark.parametrize("char", HIDDEN)
def test_what_hides_or_commands_is_shown(char: str) -> None:
    width = (4, "u") if ord(char) < 0x10000 else (8, "U")
    assert visible(f"a{char}b") == f"a\\{width[1]}{ord(char):0{width[0]}x}b"


def test_of_all_characters_no_control_or_format_character_is_left() -> None:
    hidden = ("Cc", "Cf", "Cs", "Zl", "Zp")
    left = [c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c) in hidden]
    left = [c for c in left if visible(f"a{c}") == f"a{c}"]
    assert [c for c in left if unicodedata.category(c) != "Cf"] == ["\t", "\n"]
    assert {unicodedata.name(c).split()[0] for c in left[2:]} == {"ARABIC", "SYRIAC", "KAITHI"}


def test_a_joiner_that_only_hides_is_shown() -> None:
    assert visible("ad\u200dmin \u200c and 👩\u200d\u200d") == "ad\\u200dmin \\u200c and 👩\u200d\\u200d"


def test_applied_again_it_changes_nothing() -> None:
    assert visible(visible(HIDDEN)) == visible(HIDDEN)


def test_pages_show_it() -> None:
    evil = "a\u202eb\x1bc"
    sense = SensePage(1.0, False, ((evil, 1.0),), ((evil, -1.0),), ((evil, 0.5),))
    table = Table(evil, (evil,), ((evil,),))
    for page in (
        WordPage(evil, (sense,), evil).html(),
        Report(evil, evil, (table,), notes=(evil,), made_by=evil).html(),
        GenerationPage((evil,), (TokenStep(evil, 0.5, 1.0, 0.0, ()),), 2, evil).html(),
    ):
        assert "\u202e" not in page
        assert "\x1b" not in page
        assert "a\\u202eb\\u001bc" in page
