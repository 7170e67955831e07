"""Our numbers against naive recomputation, on random weights of Small's shape but with 420 words."""

from __future__ import annotations

import math

import pytest
import torch
from backpack_lm.lab.batch_sampler import BatchSampler
from backpack_lm.lab.contrast import Contrast, Noun
from backpack_lm.lab.lab_model import LabModel, Prompts
from backpack_lm.lab.topic_vector import FrequentWords, topic_vector_edits
from backpack_lm.patch import Cell, SwapEdit, TopicEdit
from torch import Tensor

PROMPT = "The captain of the ship looked over the sea"


def _dense(subject: LabModel, ids: list[int], senses: Tensor, multipliers: Tensor | None = None) -> Tensor:
    """Logits after `ids` from the equation: one sum over senses and positions, one head."""
    alpha = subject.model.sense_weights(torch.tensor([ids]))[0, :, -1]  # [k, T]
    out = torch.zeros(subject.config.n_embd)
    for j, token in enumerate(ids):
        for sense in range(subject.config.num_senses):
            weight = alpha[sense, j] if multipliers is None else alpha[sense, j] * multipliers[sense, j]
            out += weight * senses[token, sense]
    return out @ subject.model.embedding.t()


def test_topic_weights_and_annealing(small: LabModel) -> None:
    sea, ship = small.token("sea"), small.token("ship")
    rows, embedding, tokens = small.table.rows, small.model.embedding, small.config.tokens
    scores = torch.zeros(rows.shape[:2])
    for token in range(tokens):
        logits = rows[token] @ embedding.t()  # [k, V]
        scores[token] = (logits[:, sea] + logits[:, ship]) / logits.amax(1)
    scores[small.config.eos_token_id] = 0
    high, middle, low = (torch.quantile(scores.flatten(), q) for q in (0.95, 0.80, 0.60))
    delta = torch.where(scores > middle, 3.3, torch.where(scores > low, 3.0, 1.0))  # strength 3: 3.3, 3.3, 3, 1
    assert (scores > high).any()

    topic = small.overlay(TopicEdit((sea, ship), 3)).topics[0]
    assert torch.equal(topic.targets(torch.arange(tokens)), delta)

    ids = small.ids(PROMPT)
    multipliers = torch.ones(small.config.num_senses, len(ids))
    for j, token in enumerate(ids):
        said = rows[token] @ embedding.t()  # [k, V]: the full projection that the reference makes
        a = said[:, ids].relu().sum(1)
        b = torch.sigmoid(-(3.3 / 7.5) * a + 6) * (1 + j / 100)
        multipliers[:, j] = b * delta[token] + (1 - b)
    expected = _dense(small, ids, rows, multipliers)
    sampler = BatchSampler(small, small.overlay(TopicEdit((sea, ship), 3)), 1, len(ids))
    for token in ids:
        got = sampler.feed(torch.tensor([token]))[0]
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)
    assert (expected - _dense(small, ids, rows)).abs().max() > 1e-2, "the topic changed nothing"
    assert (multipliers - delta[ids].t()).abs().max() > 1e-2, "annealing changed nothing"


def test_topic_vector(small: LabModel) -> None:
    sea, ship, the, comma = (*map(small.token, ("sea", "ship", "the")), small.tokenizer.encode(",")[0])
    frequent = FrequentWords((the, comma, sea), (0.3, 0.1, 0.2))
    embedding, senses, width = small.model.embedding, small.table.rows.clone(), small.config.n_embd
    scored = [token for token in range(small.config.tokens) if token != small.config.eos_token_id]
    mean = torch.stack([embedding[t] for t in scored]).double().mean(0)
    spread = torch.zeros(width, width, dtype=torch.double)
    for token in scored:
        spread += torch.outer(embedding[token] - mean, embedding[token] - mean) / len(scored)
    spread += 0.3 * float(spread.diagonal().sum()) / width * torch.eye(width)
    wanted = (embedding[sea] + embedding[ship]).double() / 2 - mean
    u = torch.linalg.solve(spread, wanted)
    # The topic's words gain 1 over the mean by u, then 3.5 by all k senses of a share of 0.3 + 0.1 of the text.
    delta = (3.5 / (0.3 + 0.1) / small.config.num_senses * u / (wanted @ u)).float()
    for sense in range(small.config.num_senses):
        for token, sign in ((the, 1), (comma, 1), (sea, -1), (ship, -1)):
            senses[token, sense] += sign * delta
    expected = _dense(small, small.ids(PROMPT), senses)
    edits = topic_vector_edits(small, [sea, ship], 2, frequent)
    got = Prompts(small, [PROMPT]).logits(small.overlay(*edits), range(small.config.vocab_size))[0]
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=1e-3)
    assert (expected - _dense(small, small.ids(PROMPT), small.table.rows)).abs().max() > 0.1


def test_swap(small: LabModel) -> None:
    sea, land, ship = map(small.token, ("sea", "land", "ship"))
    r, a = small.model.embedding[sea], small.model.embedding[land]
    senses = small.table.rows.clone()
    for sense in range(small.config.num_senses):
        v = senses[ship, sense]
        c = torch.dot(v, r) / torch.dot(r, r)
        senses[ship, sense] = v - c * r + c * a * torch.dot(r, r) / torch.dot(a, a)
    expected = _dense(small, small.ids(PROMPT), senses).double().log_softmax(-1)
    edit = SwapEdit(tuple(Cell(ship, sense) for sense in range(small.config.num_senses)), sea, land)
    got = Prompts(small, [PROMPT]).log_probabilities(small.overlay(edit))[0]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert (got - Prompts(small, [PROMPT]).log_probabilities(small.overlay())[0]).abs().max() > 1e-3


@pytest.mark.parametrize("factor", [1.0, 0.0, -2.5])
def test_bias(small: LabModel, factor: float) -> None:
    templates = ("The {} said that", "When the king saw the {} in the room,", "A {} believes")
    he, she, nurse = map(small.token, ("he", "she", "nurse"))
    senses = small.table.rows.clone()
    senses[nurse, 10] *= factor
    ratios = []
    for template in templates:
        p = _dense(small, small.ids(template.replace("{}", "nurse")), senses).double().softmax(-1)
        ratios.append(max(float(p[he] / p[she]), float(p[she] / p[he])))
    noun = Noun(small, "nurse", templates, Contrast.of(small, "he", "she"))
    assert noun.bias(*noun.scaled(10, factor)) == pytest.approx(math.fsum(ratios) / len(ratios), rel=1e-4)
    assert math.fsum(ratios) / len(ratios) > 1.001
