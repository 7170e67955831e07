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

FRESH = (
    Fact(
        "farmer",
        "field",
        "office",
        ("The farmer went out to work in the", "The farmer stood in the middle of his"),
    ),
    Fact("soldier", "war", "school", ("The soldier came home from the", "The soldier had been away at the")),
    Fact("teacher", "students", "soldiers", ("The teacher spoke to her", "The teacher asked all of her")),
    Fact("doctor", "medicine", "bread", ("The doctor gave him some", "The doctor brought a bottle of")),
    Fact("bird", "wings", "legs", ("The bird spread its", "A bird flies with its")),
    Fact("tree", "leaves", "stones", ("The tree had lost all its", "The tree was covered with green")),
    Fact("moon", "night", "morning", ("The moon shone all through the", "The moon was seen every")),
    Fact("sun", "sky", "water", ("The sun stood high in the", "The sun rose in the eastern")),
    Fact("window", "street", "river", ("From the window she looked down into the", "The window looked out upon the")),
    Fact("train", "station", "garden", ("The train arrived at the", "The train stood in the")),
    Fact("letter", "read", "sing", ("He opened the letter and began to", "She took the letter and sat down to")),
    Fact("fire", "wood", "paper", ("They made a fire of", "For the fire he brought some dry")),
    Fact("dog", "tail", "hat", ("The dog wagged its", "The dog came in with his")),
    Fact("book", "page", "door", ("He took the book and turned to the first", "He opened the book at the last")),
    Fact("winter", "snow", "sand", ("In winter the ground is covered with", "All that winter there was much")),
    Fact("summer", "warm", "dark", ("In the summer it is very", "The summer nights were")),
    Fact("brother", "sister", "father", ("He had one brother and one", "Her brother lived with his")),
    Fact(
        "piano",
        "play",
        "break",
        ("She sat down at the piano and began to", "He came to the piano, for he wanted to"),
    ),
    Fact("hat", "head", "table", ("He put his hat on his", "She wore a hat upon her")),
    Fact("shoes", "feet", "hands", ("She put the shoes on her", "He had no shoes upon his")),
)
"""A second list, written and committed before anything was measured with it: nothing was chosen on it, and no fact
was taken out or changed afterwards. Each word is one token of the default model."""
