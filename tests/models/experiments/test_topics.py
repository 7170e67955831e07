"""Topic control: the measure of success, a stopped run, and the samples it is made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from backpack_lm.experiments.topic_judge import TopicJudge
from backpack_lm.experiments.topic_methods import TopicMethod, TopicsResult
from backpack_lm.experiments.topic_words import TOPIC_WORDS
from backpack_lm.experiments.topics import TopicControl, distinct_pairs
from backpack_lm.lab import batch_sampler
from backpack_lm.lab.lab_model import LabModel
from backpack_lm.lab.progress import unwatched
from tokenizers import Tokenizer, models, pre_tokenizers


@pytest.fixture(scope="module")
def judge(tmp_path_factory: Any) -> Path:
    """A sentence encoder's folder with random weights."""
    from transformers import BertConfig, BertModel

    folder: Path = tmp_path_factory.mktemp("judge")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=40, **shape)).save_pretrained(folder)
    letters = {"[UNK]": 0, **{chr(97 + n): n + 1 for n in range(26)}, " ": 27, ",": 28}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_a_judge_is_the_mean_of_its_hidden_states(judge: Path) -> None:
    topic_judge = TopicJudge(judge)
    alone, together = topic_judge.embed(["food"]), topic_judge.embed(["food", "music and fashion"])
    torch.testing.assert_close(alone[0], together[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(2))
    with pytest.raises(ValueError, match="no sentence encoder"):
        TopicJudge(judge.parent / "nothing")


def test_distinct_pairs() -> None:
    assert distinct_pairs("a b a b a b a") == pytest.approx(2 / 6)
    assert distinct_pairs("one two three four") == 1.0
    assert distinct_pairs("one") == 1.0


def test_a_run_that_was_stopped_ends_as_if_it_never_was(
    subject: LabModel, judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"samples": 2, "length": 8, "prompt": "The king", "judge": judge}
    whole = TopicControl(**arguments).run(subject, unwatched)
    assert isinstance(whole, TopicsResult)
    calls: list[int] = []
    real = batch_sampler.sample

    def stopping(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr("backpack_lm.experiments.topics.sample", stopping)
    work = tmp_path / "work.jsonl"
    with pytest.raises(KeyboardInterrupt):
        TopicControl(**arguments, work=work).run(subject, unwatched)
    assert len(work.read_text().splitlines()) == 20  # the settings and 19 parts
    resumed = TopicControl(**arguments, work=work).run(subject, unwatched)
    assert resumed == whole
    assert len(calls) == 20 + 188 - 19, "1 unsteered, 17 topics in 11 ways: only what was missing is made"


def test_unsteered_text_scores_chance_exactly(subject: LabModel, judge: Path) -> None:
    result = TopicControl(samples=3, length=6, judge=judge).run(subject, unwatched)
    assert isinstance(result, TopicsResult)
    assert result.ways[0].success == pytest.approx(100 / len(TOPIC_WORDS))
    for method in result.ways:
        assert method.success == pytest.approx(sum(method.by_topic.values()) / 17)
    assert len({method.perplexity for method in result.ways}) == len(result.ways), "each method gives other text"
    assert "3 ancestral samples of 6 tokens" in result.report().markdown()
    json.dumps(result.ways[0].by_topic)


def test_what_is_reported_of_each_method() -> None:
    topics = dict.fromkeys(TOPIC_WORDS, 1.0)

    def method(name: str, strength: float, success: float, perplexity: float, distinct: float) -> TopicMethod:
        return TopicMethod(name, *map(float, (strength, success, perplexity, distinct)), topics, "text")

    def result(frequent: TopicMethod) -> TopicsResult:
        plain = [method("logit bias", 4, 40, 200, 90), method("logit bias", 6, 80, 300, 60)]
        methods = [method("unsteered", 0, 5, 100, 99), method("multipliers", 3, 6, 90, 99), frequent, *plain]
        return TopicsResult(methods, {topic: ["word"] for topic in TOPIC_WORDS}, 3, 6, "", "the twin")

    good = result(method("lean", 3, 60, 240, 80))
    perplexity, distinct = good.bias_at(60) or (0.0, 0.0)
    assert perplexity == pytest.approx((200 * 300) ** 0.5)
    assert distinct == pytest.approx(75)
    assert good.headline().reached
    figures = good.headline().figures
    assert "by multipliers, the paper's way: 6.0 % (1.2 times)" in figures
    assert "the lab's way: 60.0 % (12.0 times), perplexity 100 → 240, distinct pairs 99 → 80 %" in figures
    assert figures.endswith("a logit bias of equal success: 245, 75 %")
    report = good.report()
    assert "| lean | 3.0 | 60.0 | 240.0 | 80.0 | 244.9 | 75.0 |" in report.markdown()
    assert "Strength 3 by multipliers does not reach" in report.markdown()
    assert "Strength 3 by lean does not reach" not in report.markdown()
    assert len(report.figures) == 2
    for worse in (
        method("lean", 3, 60, 250, 80),  # less likely than the logit bias
        method("lean", 3, 60, 240, 70),  # less distinct
        method("lean", 3, 14, 110, 99),  # not three times
        method("lean", 3, 90, 240, 80),  # nothing to compare with
    ):
        assert not result(worse).headline().reached
        assert "Strength 3 by lean does not reach" in result(worse).report().markdown()
