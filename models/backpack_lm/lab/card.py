"""The parts of a model's card that are measured: a run's shapes and perplexities, and a few senses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from backpack_lm import strict_json
from backpack_lm.config import BackpackConfig
from backpack_lm.lab.lab_model import LabModel
from backpack_lm.reports.report import Entry, Table
from backpack_lm.training.trainer import CHECKPOINT, read_checkpoint

WORDS = ("court", "ship", "nurse", "king", "money")
_PART = "<!-- {} -->\n"


def run_table(run: Path) -> Table:
    """A run of `backpack train`: the Backpack and, if it was trained too, its twin, side by side.

    Raises ValueError if there is no finished run in the folder.
    """
    names = {"backpack": "Backpack", "twin": "its Transformer twin"}
    found = {name: _run_summary(run / name) for name in names if (run / name / CHECKPOINT).exists()}
    if "backpack" not in found:
        raise ValueError(f"{run} holds no backpack/{CHECKPOINT}; give the --out of `backpack train`")
    rows: list[tuple[Entry, ...]] = [
        (what, *(one[what] for one in found.values())) for what in next(iter(found.values()))
    ]
    return Table("", ("", *(names[name] for name in found)), tuple(rows))


def senses_table(subject: LabModel, words: Sequence[str], each: int = 2) -> Table:
    """Of each word the senses that are most its own: farthest from what that sense says of the average word."""
    table, own = subject.table, []
    mean, typical = table.rows.mean(0), torch.tensor(subject.manifest.sense_rms)
    for word in words:
        vectors = table.rows[subject.token(word)]  # [k, d]
        for sense in ((vectors - mean).norm(dim=1) / typical).topk(min(each, len(vectors))).indices.tolist():
            scores = vectors[sense] @ subject.head.t()
            own.append((f"{word}, {sense}", _words_of_sense(subject, scores, 6), _words_of_sense(subject, -scores, 4)))
    return Table("", ("word, sense", "raises", "lowers"), tuple(own))


def fill(card: str, parts: Mapping[str, str]) -> str:
    """A card in Markdown with each part anew between its marks, `<!-- name -->` and `<!-- /name -->`.

    Raises ValueError for marks that aren't there.
    """
    for name, text in parts.items():
        start, end = _PART.format(name), _PART.format("/" + name)
        before, found, rest = card.partition(start)
        _, ended, after = rest.partition(end)
        if not found or not ended:
            raise ValueError(f"the card has no {start.strip()} and {end.strip()}, each on a line of its own")
        card = f"{before}{start}{text}\n{end}{after}"
    return card


def _run_summary(folder: Path) -> dict[str, str]:
    state = read_checkpoint(folder / CHECKPOINT)
    made_by: dict[str, Any] = strict_json.parse(state["made_by"])
    parts = [(state["step"], made_by["recipe"]["tokens_per_step"])]
    config = BackpackConfig.from_json(made_by["config"])
    if not (measured := folder / "perplexity.json").exists():
        raise ValueError(f"{folder} has no perplexity.json: the run isn't finished; `backpack train` goes on with it")
    trunk, senses = config.trunk, "–" if made_by["twin"] else config.num_senses
    sizes = (str(size) for size in (trunk.depth, trunk.layer.heads, trunk.width, senses, trunk.context))
    while made_by := made_by.get("after", {}):
        parts.insert(0, (made_by["recipe"]["steps"], made_by["recipe"]["tokens_per_step"]))
    taken = " + ".join(f"{steps:,} × {tokens:,}" for steps, tokens in parts)
    return {
        "layers / heads / width / senses / context": " / ".join(sizes),
        "parameters": f"{sum(tensor.numel() for tensor in state['model'].values()):,}",
        "steps × tokens": f"{taken} = {sum(steps * tokens for steps, tokens in parts) / 1e6:.1f} million",
        **{
            f"held-out perplexity, {name}": f"{value:.1f}"
            for name, value in strict_json.read(measured, finite=False).items()
        },
    }


def _words_of_sense(subject: LabModel, scores: torch.Tensor, count: int) -> str:
    best = scores.topk(min(4 * count, len(scores))).indices.tolist()
    pieces = [subject.tokenizer.piece(token).strip() for token in best if token != subject.config.eos_token_id]
    return " ".join(list(dict.fromkeys(p for p in pieces if any(map(str.isalpha, p))))[:count])
