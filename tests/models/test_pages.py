"""Pages: one file each, nothing from outside gets out of its place, and what they hold is what they were given."""

from __future__ import annotations

import json
import re

import pytest
from backpack_lm.reports.generation import GenerationPage, TermRow, TokenStep
from backpack_lm.reports.word import SensePage, WordPage
from backpack_lm.visible import visible

HOSTILE = "</script><img src=x onerror=alert(1)>&\u2028"


def _data(html: str) -> dict[str, object]:
    found = re.search(r"const DATA = (.*);\n", html)
    assert found is not None
    values: dict[str, object] = json.loads(found[1])
    return values


def test_a_word_shows_every_sense() -> None:
    senses = tuple(
        SensePage(1.0 + n, n == 1, ((f"up{n}", 2.5), (HOSTILE, 1.0)), ((f"down{n}", -3.0),), ((f"near{n}", 0.9),))
        for n in range(3)
    )
    html = WordPage("ship", senses, "Model 123.").html()
    assert "The senses of “ship”" in html
    for n in range(3):
        assert all(f">{word}{n}<" in html for word in ("up", "down", "near"))
    assert html.count("<span class=edited>") == 1
    assert HOSTILE not in html
    assert "<img" not in html
    assert "Model 123." in html


def test_a_generation_holds_its_terms_and_they_add_up() -> None:
    terms = (TermRow(0, 1, 0.75, 1.0, 1.25), TermRow(1, 0, 0.5, 2.2, -0.5))
    made = TokenStep(" ship", 0.25, 3.35, 0.1, terms, bias=2.5)
    page = GenerationPage(("The", HOSTILE), (made,), senses=2, note="release 1")
    html = page.html()
    data = _data(html)
    assert data["prompt"] == ["The", visible(HOSTILE)]
    (step,) = data["steps"]  # type: ignore[misc]
    total = sum(term["contribution"] for term in step["terms"]) + step["unlisted"] + step["bias"]
    assert total == pytest.approx(step["logit"])
    assert html.count("</script>") == 1, "the text can't end the script"
    assert "<img" not in html


@pytest.mark.parametrize(
    "html", [WordPage("w", (SensePage(1, False, (), (), ()),)).html(), GenerationPage((), (), 1).html()]
)
def test_a_page_needs_no_network(html: str) -> None:
    assert html.startswith("<!doctype html>")
    assert not re.search(r"""(src|href)=|@import|url\(|fetch\(|https?://""", html)
