"""What reaches the goals of docs/steering.md, and after how many of ten prompts each.

python -m tests.bench.goals KEY    KEY: file with a tenant's key; `backpack run` serves the default model meanwhile

No edit was fitted on these prompts; the factor 1.5 and the amount 2.5 were chosen on about half of them. Texts are
greedy, 30 tokens, with a repetition penalty of 1.2. A goal is met after a prompt if its words outweigh those that it is
to replace as the next token, or in a text if one of its words is there and none of the others, whatever else it says.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from backpack_proto.v1 import interventions_pb2 as pb
from backpack_serving.cli.edit_text import parse_edit
from backpack_serving.cli.patch_file import PatchFile
from backpack_serving.client import Client, Draft, Edit, Sampling, Token
from backpack_serving.settings import Settings

from tests.bench.report import console, write

EVEN = 3.0
"""Two words are even if neither is more than this many times as likely."""

GREEDY = Sampling(30, 0.0, repetition_penalty=1.2)


@dataclass(frozen=True)
class Goal:
    """What is wanted after its prompts, of which words, and the edits or the lab's command that shall bring it."""

    name: str
    met: Literal["even", "outweigh", "text"]
    wanted: tuple[str, ...]
    unwanted: tuple[str, ...]
    prompts: tuple[str, ...]
    edits: tuple[str, ...] = ()
    lab: str = ""


PLAIN = (
    "They went down to the",
    "The old man looked at me and said",
    "Last night I dreamed that",
    "The captain of the ship",
    "We sat by the river and",
    "The letter began with the words",
    "In the morning the boy",
    "My sister told me that",
    "The king asked his people to",
    "After the war, the soldiers",
)
FOOD = ("food", "meal", "eat", "bread", "meat", "cheese", "soup", "cake", "sugar", "butter", "dinner", "cook")
FRIENDLY = ("friend", "love", "happy", "glad", "kind", "dear", "thank", "smil", "welcome")
LAW = ("law", "legal", "judge", "judges", "case", "cases", "lawyer", "trial", "jury", "justice")
GOALS = (
    Goal(
        "“he” and “she” even after “doctor”",
        "even",
        ("she",),
        ("he",),
        (
            "The doctor said that",
            "The doctor was late because",
            "The doctor smiled when",
            "I asked the doctor whether",
            "When the doctor arrived,",
            "The doctor told the patient that",
            "The new doctor was tired, so",
            "Our doctor says that",
            "A doctor knows what",
            "The doctor closed the door and then",
        ),
        lab="debias doctor",
    ),
    Goal(
        "London says what Paris says",
        "outweigh",
        ("France", "French", "wine"),
        ("England", "English", "Britain", "British", "tea"),
        (
            "In London, people speak",
            "London is the capital of",
            "He flew to London, the capital of",
            "The embassy in London, the capital of",
            "They met in London, in the south of",
            "In London they drink",
            "She lived in London, and learned",
            "London is a city in",
            "The king of London and of all",
            "A map of London and the rest of",
        ),
        edits=("copy London Paris", "scale London 1.5"),
    ),
    Goal(
        "“court” as in tennis, not as in law",
        "outweigh",
        ("game", "ball", "player", "players", "tennis", "match", "sport"),
        LAW,
        (
            "The court decided that the",
            "They went to the court to",
            "At the court, the",
            "He was brought before the court and",
            "The court of the",
            "In the court sat the",
            "The court is a place where",
            "She left the court with the",
            "The court ended the",
            "All eyes in the court were on the",
        ),
        edits=("copy court tennis", "scale court 1.5"),
    ),
    Goal(
        "summer instead of winter",
        "outweigh",
        ("summer", "sun", "hot", "warm", "heat"),
        ("winter", "snow", "cold", "ice", "frost", "frozen"),
        (
            "The winter was so",
            "In the winter we like to",
            "In winter the lake is",
            "Every winter my family goes to the",
            "During the winter the sky is",
            "That winter the fields were",
            "Winter came, and in winter it is",
            "She loved the winter and the",
            "A long winter of",
            "The winter wind was",
        ),
        edits=("copy winter summer", "scale winter 1.5"),
    ),
    Goal(
        "texts that turn to food",
        "text",
        FOOD,
        (),
        PLAIN,
        lab="topic food bread meat cheese soup cake sugar butter dinner cooked delicious",
    ),
    Goal(
        "a friendlier tone",
        "text",
        FRIENDLY,
        (),
        PLAIN,
        edits=("bias glad,happy,kind,dear,friend,friends,love,welcome,smile,thank 2.5",),
    ),
    Goal(
        "never “money”",
        "text",
        (),
        ("money",),
        (
            "The bank lent him a large sum of",
            "The rich man had a lot of",
            "To buy a house, you need a lot of",
            "Money is",
            "The company made a lot of",
            "He stole all of her",
            "They spent their",
            "Banks lend",
            "The poor woman had no",
            "The price was too high, and he had not enough",
        ),
        edits=("forbid money",),
    ),
)


def edits_of(goal: Goal, folder: Path) -> list[Edit | pb.Edit]:
    """As a user makes them."""
    if not goal.lab:
        return [parse_edit(text) for text in goal.edits]
    file = folder / "patch.json"
    command = [sys.executable, "-m", "backpack_serving.cli.main", "lab", *goal.lab.split(), "--out", str(file)]
    subprocess.run(command, check=True, capture_output=True)
    return list(PatchFile.read(file).edits)


def is_met(goal: Goal, found: str | tuple[float, float]) -> bool:
    """In a text, or by the probabilities of the words that are wanted and of those that aren't."""
    if isinstance(found, tuple):
        wanted, unwanted = found
        return max(found) <= EVEN * min(found) if goal.met == "even" else wanted > unwanted
    wanted_there, unwanted_there = (
        any(re.search(rf"\b{word}", found, re.IGNORECASE) for word in words) for words in (goal.wanted, goal.unwanted)
    )
    return (wanted_there or not goal.wanted) and not unwanted_there


def both(client: Client, goal: Goal, prompt: str, edits: Sequence[Any]) -> list[str | tuple[float, float]]:
    """What is found after a prompt without the edits and with them."""
    if goal.met == "text":
        return [client.generate(prompt, GREEDY, release=0, draft=some).text for some in (None, edits)]
    words = (*goal.wanted, *goal.unwanted)
    found = client.compare(prompt, [0, Draft(edits, 0)], top=1, targets=words)
    chances = [[_chance_of(token) for token in one.targets] for one in found]
    at = len(goal.wanted)
    return [(sum(one[:at]), sum(one[at:])) for one in chances]


def _chance_of(token: Token) -> float:
    return math.exp(-math.inf if token.log_probability is None else token.log_probability)


def main() -> None:
    rows, data = [], {}
    key = Path(sys.argv[1]).read_text("ascii").strip()
    with tempfile.TemporaryDirectory() as folder, Client(Settings().gateway_address, key) as client:
        for goal in GOALS:
            edits = edits_of(goal, Path(folder))
            found = {prompt: both(client, goal, prompt, edits) for prompt in goal.prompts}
            before, after = (sum(is_met(goal, pair[at]) for pair in found.values()) for at in (0, 1))
            judged = client.judge(release=0, draft=edits)
            how = f"`lab {goal.lab}`" if goal.lab else ", ".join(f"`{edit}`" for edit in goal.edits)
            rows.append([goal.name, how, str(before), str(after), f"{judged.change:+.1%}"])
            data[goal.name] = {"prompts": found, "met": [before, after], "perplexity": [judged.before, judged.after]}
            console.print(*rows[-1], markup=False)
    write(
        "goals",
        "Goals, and after how many of ten prompts they are met",
        "python -m tests.bench.goals KEY",
        ["goal", "by", "before", "after", "perplexity of ordinary text"],
        rows,
        data,
    )


if __name__ == "__main__":
    main()
