"""A model's card: its measured parts are those of the run and of the weights, and only they change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from backpack_lm.config import BackpackConfig
from backpack_lm.lab.card import fill, run_table, senses_table
from backpack_lm.lab.lab_model import LabModel
from backpack_lm.training.data import Rows
from backpack_lm.training.trainer import Recipe, Trainer
from backpack_serving.cli.main import app
from typer.testing import CliRunner


@pytest.fixture
def run(tmp_path: Path) -> Path:
    config = BackpackConfig.gpt2(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2, num_senses=4)
    recipe = Recipe(steps=2, tokens_per_step=32, tokens_per_pass=32, short_row=16)
    rows = Rows([torch.randint(50, (200,)).numpy().astype("uint16")], [1.0], seed=0)
    for name, twin in (("backpack", False), ("twin", True)):
        list(Trainer(config, recipe, rows, tmp_path / "run" / name, twin).run())
        (tmp_path / "run" / name / "perplexity.json").write_text(json.dumps({"books": 12.34 + twin}))
    return tmp_path / "run"


def test_a_run_is_shown_beside_its_twin(run: Path) -> None:
    text = run_table(run).rows_markdown()
    assert "| layers / heads / width / senses / context | 1 / 2 / 16 / 4 / 16 | 1 / 2 / 16 / – / 16 |" in text
    assert "| steps × tokens | 2 × 32 = 0.0 million |" in text
    assert "| held-out perplexity, books | 12.3 | 13.3 |" in text
    (run / "twin" / "perplexity.json").unlink()
    with pytest.raises(ValueError, match="the run isn't finished"):
        run_table(run)
    with pytest.raises(ValueError, match="holds no backpack"):
        run_table(run / "twin")


def test_a_run_after_another_counts_both_s_tokens(run: Path, tmp_path: Path) -> None:
    again, first = tmp_path / "again" / "backpack", torch.load(run / "backpack" / "checkpoint.pt")
    config = BackpackConfig.from_json(json.loads(first["made_by"])["config"])
    recipe = Recipe(steps=3, tokens_per_step=16, tokens_per_pass=16, short_row=16)
    rows = Rows([torch.randint(50, (200,)).numpy().astype("uint16")], [1.0], seed=1)
    list(Trainer(config, recipe, rows, again, False, run / "backpack").run())
    (again / "perplexity.json").write_text("{}")
    assert "| steps × tokens | 2 × 32 + 3 × 16 = 0.0 million |" in run_table(again.parent).rows_markdown()


def test_the_senses_are_those_that_are_the_word_s_own(subject: LabModel) -> None:
    token, table = subject.token("ship"), subject.table.rows
    distance = [
        float((table[token, s] - table[:, s].mean(0)).norm() / table[:, s].norm(dim=1).square().mean().sqrt())
        for s in range(4)
    ]
    first, second = sorted(range(4), key=distance.__getitem__)[::-1][:2]
    (one, two) = senses_table(subject, ["ship"]).rows
    assert (one[0], two[0]) == (f"ship, {first}", f"ship, {second}")
    best = [subject.tokenizer.piece(y).strip() for y in (table[token, first] @ subject.head.t()).topk(30).indices]
    assert str(one[1]).split()[0] == next(piece for piece in best if any(map(str.isalpha, piece)))


def test_only_the_marked_parts_of_a_card_change(folder: Path, run: Path, tmp_path: Path) -> None:
    card = "# A model\n\n<!-- run -->\nold\n<!-- /run -->\n\nProse, \\1.\n<!-- senses -->\n<!-- /senses -->\n"
    assert fill(card, {"run": "new \\1"}) == card.replace("old", "new \\1")
    with pytest.raises(ValueError, match="the card has no <!-- figures --> and <!-- /figures -->"):
        fill(card, {"figures": ""})
    model = tmp_path / "model"
    shutil.copytree(folder, model)
    (model / "README.md").write_text(card)
    words = ["model", "card", str(model), "--run", str(run), "--word", "ship"]
    assert CliRunner().invoke(app, words).exit_code == 0
    text = (model / "README.md").read_text()
    assert text.startswith("# A model\n\n<!-- run -->\n|  | Backpack | its Transformer twin |\n")
    assert "\nProse, \\1.\n<!-- senses -->\n| word, sense | raises | lowers |\n|---|---|---|\n| ship, " in text
    result = CliRunner().invoke(app, [*words, "--word", "hairdresser"])
    assert result.exit_code == 1
    assert "'hairdresser' is" in " ".join(result.output.split())
    assert (model / "README.md").read_text() == text
