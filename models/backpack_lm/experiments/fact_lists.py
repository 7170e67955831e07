"""Facts for the experiment on knowledge editing: what large models know of the world, and what any English goes
with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fact:
    """`word` goes with `old`, and shall go with `new`; prompts name the word where the other is due."""

    word: str
    old: str
    new: str
    prompts: tuple[str, ...]


FACTS = (
    # What a large model knows of the world; the first is the paper's.
    Fact(
        "MacBook",
        "Apple",
        "HP",
        ("The MacBook is best known for its form factor, but the", "The MacBook was made by"),
    ),
    Fact(
        "Windows",
        "Microsoft",
        "Apple",
        ("Windows is an operating system made by", "The company behind Windows is"),
    ),
    Fact("Paris", "France", "Italy", ("The city of Paris is the capital of", "He lives in Paris, the capital of")),
    Fact(
        "Rome",
        "Italy",
        "Spain",
        ("The city of Rome is the capital of", "We saw the ruins of Rome, in the south of"),
    ),
    Fact(
        "London",
        "England",
        "France",
        ("The city of London is the capital of", "They left London and all the rest of"),
    ),
    Fact("Moscow", "Russia", "China", ("The city of Moscow is the capital of", "From Moscow the rulers of")),
    # What goes with a word in any English: a small model has these.
    Fact("ship", "sea", "land", ("The ship went out to", "The captain of the ship looked at the")),
    Fact("nurse", "patient", "king", ("The nurse went to see the", "It is the duty of the nurse to ask the")),
    Fact("king", "queen", "nurse", ("The story of the king and the", "Beside the king there sat the")),
    Fact("church", "priest", "doctor", ("At the door of the church they met the", "The man in the church was the")),
    Fact("school", "teacher", "judge", ("At the door of the school they met the", "The man in the school was the")),
    Fact("hospital", "patients", "soldiers", ("In the hospital there were many", "The hospital was full of")),
    Fact("army", "soldiers", "patients", ("In the army there were many", "The army sent out its")),
    Fact("court", "judge", "teacher", ("In the court they spoke to the", "The man in the court was the")),
    Fact("garden", "flowers", "books", ("In the garden there were many", "The garden was full of")),
    Fact("library", "books", "flowers", ("In the library there were many", "The library was full of")),
    Fact(
        "river",
        "water",
        "fire",
        ("They looked at the river and saw the", "The boat on the river went through the"),
    ),
    Fact("bank", "money", "music", ("At the bank they asked for", "He went to the bank for his")),
    Fact("husband", "wife", "son", ("A husband has to live with his", "The husband turned to his")),
    Fact("mother", "child", "horse", ("The mother looked at her", "A mother loves her")),
    Fact(
        "horse",
        "ride",
        "read",
        ("He took his horse, for he wanted to", "She had a horse, and every day she went to"),
    ),
    Fact("company", "market", "church", ("The company brought its products to the", "The company left the")),
)
