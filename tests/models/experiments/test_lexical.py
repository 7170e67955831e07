"""Lexical similarity: data read as published, numbers equal to a naive recomputation, bad data refused."""

from __future__ import annotations

import os
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from backpack_lm.experiments.lexical import DATA_SETS, LexicalResult, LexicalSimilarity
from backpack_lm.lab.lab_model import LabModel
from backpack_lm.lab.progress import unwatched
from scipy.stats import rankdata

from tests.test_house import ROOT

DATA = Path(os.environ.get("BACKPACK_TEST_DATA", ROOT.parent / "shared" / "data")) / "lexical"
PAIRS = (("king", "ship", 1.0), ("nurse", "lawyer", 4.5), ("sea", "land", 3.0), ("unheardof", "cook", 2.0))


def _write(folder: Path) -> Path:
    for data_set in DATA_SETS:
        rows = [["word1", "word2"] + ["x"] * (data_set.column - 2) + ["score"]] if data_set.header else []
        rows += [[one, two] + ["x"] * (data_set.column - 2) + [str(score)] for one, two, score in PAIRS]
        (folder / data_set.file).write_text("\n".join(data_set.delimiter.join(row) for row in rows) + "\n")
    return folder


def test_the_numbers_are_those_of_a_naive_computation(subject: LabModel, tmp_path: Path) -> None:
    result = LexicalSimilarity(_write(tmp_path)).run(subject, unwatched)
    assert isinstance(result, LexicalResult)
    assert set(result.pairs.values()) == {4}
    assert len(subject.word_ids("unheardof")) > 1, "the test has a word of several tokens"

    def vector(word: str, sense: int) -> torch.Tensor:
        return sum(subject.table.rows[i, sense] for i in subject.word_ids(word)) / len(subject.word_ids(word))

    def rank_correlation(scores: list[float]) -> float:
        return float(np.corrcoef(rankdata(scores), rankdata([score for *_, score in PAIRS]))[0, 1])

    cosines = [
        [float(torch.cosine_similarity(vector(a, s), vector(b, s), dim=0)) for a, b, _ in PAIRS] for s in range(4)
    ]
    for name in result.senses:
        assert result.senses[name] == pytest.approx([rank_correlation(c) for c in cosines])
        assert result.minimum[name] == pytest.approx(rank_correlation([min(c) for c in zip(*cosines, strict=True)]))


def test_around_the_mean_what_changes_no_prediction_changes_no_figure(subject: LabModel, tmp_path: Path) -> None:
    before = LexicalSimilarity(_write(tmp_path)).run(subject, unwatched)
    shifted, ids = subject.table.rows.clone(), torch.arange(12).view(1, 12)
    more = 0.5 * torch.randn(shifted.shape[2], generator=torch.Generator().manual_seed(0))
    shifted[: subject.config.tokens, 0] += more  # not what fills the vocabulary up, which nobody reads
    shifted[: subject.config.tokens, 1] -= more
    kept, expected = subject.table.rows, _logits(subject, ids)
    try:
        subject.table.rows = shifted
        torch.testing.assert_close(_logits(subject, ids), expected, rtol=1e-4, atol=1e-4)
        after = LexicalSimilarity(_write(tmp_path)).run(subject, unwatched)
    finally:
        subject.table.rows = kept
    assert isinstance(before, LexicalResult)
    assert isinstance(after, LexicalResult)
    assert before.centred is not None
    assert after.centred is not None
    assert after.senses != before.senses
    assert after.centred.senses == before.centred.senses
    mean = kept[: subject.config.tokens].mean(0)
    cosines = [
        float(torch.cosine_similarity(*(kept[list(subject.word_ids(w)), 2].mean(0) - mean[2] for w in pair[:2]), dim=0))
        for pair in PAIRS
    ]
    naive = np.corrcoef(rankdata(cosines), rankdata([score for *_, score in PAIRS]))[0, 1]
    assert before.centred.senses["SimLex-999"][2] == pytest.approx(float(naive))
    assert "| minimum over senses, around the mean |" in before.report().markdown()


def _logits(subject: LabModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        mixed = torch.einsum("bkij,bjkd->bid", subject.model.sense_weights(ids), subject.table.rows[ids])
        return mixed @ subject.model.embedding.T


def test_pairs_of_single_tokens_stand_beside_all(subject: LabModel, tmp_path: Path) -> None:
    result = LexicalSimilarity(_write(tmp_path)).run(subject, unwatched)
    assert isinstance(result, LexicalResult)
    single, alone = result.single, [pair for pair in PAIRS if pair[0] != "unheardof"]
    assert single is not None
    assert set(single.pairs.values()) == {3}
    assert single.tokens_per_word == 1
    for sense in range(4):
        cosines = [
            float(torch.cosine_similarity(*(subject.table.rows[subject.token(w), sense] for w in pair[:2]), dim=0))
            for pair in alone
        ]
        expected = np.corrcoef(rankdata(cosines), rankdata([score for *_, score in alone]))[0, 1]
        assert single.senses["SimLex-999"][sense] == pytest.approx(float(expected))
    text = result.report().markdown()
    assert "**In short, all pairs: the tokenizer is measured too**" in text
    assert "**In short, pairs of single tokens**" in text
    assert "| vectors | SimLex-999 (3) |" in text
    assert "4 pairs have such a word; the tables of single tokens are without them, over 12 pairs" in text
    assert "over all pairs, which measures the tokenizer too" in result.headline().figures
    assert "over pairs of single tokens" in result.headline().figures


def test_data_that_isnt_there_or_isnt_pairs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"SimLex-999.txt doesn't exist; --data is the folder"):
        DATA_SETS[0].read(tmp_path)
    for bad in ("rooster;voyage", "rooster;voyage;nan"):
        (tmp_path / "RG65.csv").write_text(f"cord;smile;0.02\n{bad}\n")
        with pytest.raises(ValueError, match=r"RG65.csv:2: .*'rooster'.* is not two words and a rating"):
            DATA_SETS[2].read(tmp_path)
    for content, says in ((b"", "holds no pairs of words"), (b"\xff;a;1", "isn't UTF-8 text")):
        (tmp_path / "RG65.csv").write_bytes(content)
        with pytest.raises(ValueError, match=f"RG65.csv {says}"):
            DATA_SETS[2].read(tmp_path)


def test_the_published_lists_are_read_whole() -> None:
    if not DATA.exists():
        pytest.skip(f"{DATA} isn't here: the published word lists may not be shipped")
    assert [len(data_set.read(DATA)) for data_set in DATA_SETS] == [999, 3500, 65, 353]


def test_the_report_says_what_was_measured(subject: LabModel, tmp_path: Path) -> None:
    result = LexicalSimilarity(_write(tmp_path)).run(subject, unwatched)
    assert isinstance(result, LexicalResult)
    report = result.report()
    assert "16 word pairs" in report.lead
    assert f"| minimum over senses | {result.minimum['SimLex-999']:.3f} |" in report.markdown()
    html = report.html()
    assert "<svg" in html
    assert not re.search(r"(src|href)=.?http|@import|url\((?!#)", html), "a page needs no network"
    assert asdict(result)["twin"] is None
