"""Other people's clients, unmodified: `make test-clients` installs them."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from backpack_serving.client import Client, Sampling

from tests.http.conftest import PROMPT, Web

HERE = Path(__file__).parent
CLIENTS = Path(os.environ.get("BACKPACK_CLIENTS", HERE.parent.parent / ".venv-clients"))
"""An environment with clients-requirements.txt, and OpenAI's client for Node in its folder `node`."""

TEXTS = (
    "The story of the king and the ship, which nobody in the harbour had told before.",
    "In the morning the water was still, and the men of the village went to the river.",
    "Naïve – that is what they called her.",
)

pytestmark = pytest.mark.slow


def run(*words: str | Path, **more: Any) -> str:
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(list(map(str, words)), env=environment | more, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def installed(name: str) -> Path:
    program = CLIENTS / "bin" / name
    if not program.exists():
        pytest.skip(f"no {program}: make test-clients installs it")
    return program


def expected(web: Web) -> tuple[str, str]:
    """A completion and a chat, as gRPC gives them."""
    with Client(web.gateway, web.key) as grpc:
        text = grpc.generate(PROMPT, Sampling(max_tokens=12, seed=3, temperature=0.7)).text
        asked = [*(token.id for token in grpc.tokenize("user: Tell me of the king")), 0]
        asked += [token.id for token in grpc.tokenize("\nassistant:")]
        return text, grpc.generate(asked, Sampling(max_tokens=6, seed=2)).text


def test_openais_client_for_node(web: Web) -> None:
    if not shutil.which("node"):
        pytest.skip("node isn't installed")
    if not (CLIENTS / "node" / "node_modules" / "openai").exists():
        pytest.skip(f"no openai in {CLIENTS / 'node'}: make test-clients installs it, where there is npm")
    script = CLIENTS / "node" / "openai_node.mjs"  # modules are found from where a script is
    shutil.copy(HERE / "openai_node.mjs", script)
    found = json.loads(run("node", script, web.url, web.key, PROMPT))
    with Client(web.gateway, web.key) as grpc:
        same = grpc.generate(PROMPT, Sampling(max_tokens=12, seed=3))
    assert found["models"] == ["live"]
    assert found["text"] == found["streamed"] == same.text
    assert found["served"]["release_digest"] == same.served.digest
    assert found["usage"] == {"prompt_tokens": 7, "completion_tokens": 12, "total_tokens": 19}
    assert found["chat"] == expected(web)[1]
    assert found["refused"] == {"kind": "NotFoundError", "status": 404, "code": "NO_SUCH_CHANNEL"}


def test_langchain_and_litellm(web: Web) -> None:
    said = run(installed("python"), HERE / "other_clients.py", web.url, web.key, PROMPT)
    found = json.loads(said.splitlines()[-1])
    text, chat = expected(web)
    for client in ("langchain", "litellm"):
        assert found[client] == {"text": text, "streamed": text, "chat": chat, "chat_streamed": chat}, client


def test_lm_eval_measures_what_scores_say(web: Web, tmp_path: Path) -> None:
    """Perplexity of texts, and of ends of texts with whether they are what greedy generation makes."""
    program, model = installed("lm_eval"), tmp_path / "tokenizer"
    model.mkdir()
    shutil.copy(web.state / "model" / "tokenizer.json", model)
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    (model / "tokenizer_config.json").write_text(json.dumps(special))
    with Client(web.gateway, web.key) as grpc:
        greedy = grpc.generate(PROMPT, Sampling(max_tokens=3, temperature=0)).text
        ends = [(PROMPT, greedy), (PROMPT, " ship"), ("In the morning the water was", " still")]
        lines = [{"text": text} for text in TEXTS]
        (tmp_path / "texts.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        lines = [{"start": start, "end": end} for start, end in ends]
        (tmp_path / "ends.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        common = "dataset_path: json\ntest_split: test\nmetadata: {version: 1}\n"
        (tmp_path / "texts.yaml").write_text(
            f"task: texts\n{common}dataset_kwargs: {{data_files: {{test: {tmp_path / 'texts.jsonl'}}}}}\n"
            "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
            "metric_list: [{metric: byte_perplexity}, {metric: word_perplexity}]\n"
        )
        (tmp_path / "ends.yaml").write_text(
            f"task: ends\n{common}dataset_kwargs: {{data_files: {{test: {tmp_path / 'ends.jsonl'}}}}}\n"
            "output_type: loglikelihood\ndoc_to_text: '{{start}}'\ndoc_to_target: '{{end}}'\ntarget_delimiter: ''\n"
            "metric_list: [{metric: perplexity, aggregation: perplexity}, {metric: acc, aggregation: mean}]\n"
        )
        arguments = (
            f"model=live,base_url={web.url}/v1/completions,tokenizer_backend=huggingface,tokenizer={model},"
            "max_length=512,num_concurrent=2,max_retries=1"
        )
        run(
            program, "--model", "local-completions", "--model_args", arguments, "--tasks", "texts,ends",
            "--include_path", tmp_path, "--output_path", tmp_path / "out", "--batch_size", "2", OPENAI_API_KEY=web.key,
        )  # fmt: skip
        (results,) = (tmp_path / "out").rglob("results_*.json")
        found = json.loads(results.read_text())["results"]
        end_of_text = 0
        scores = [grpc.score([end_of_text, *(token.id for token in grpc.tokenize(text))]) for text in TEXTS]
        total = math.fsum(score.log_probability for score in scores)
        bytes_, words = sum(len(text.encode()) for text in TEXTS), sum(len(text.split()) for text in TEXTS)
        assert found["texts"]["byte_perplexity,none"] == pytest.approx(math.exp(-total / bytes_), rel=1e-6)
        assert found["texts"]["word_perplexity,none"] == pytest.approx(math.exp(-total / words), rel=1e-6)
        logs = []
        for start, end in ends:
            tokens = grpc.score(start + end).tokens
            logs.append(math.fsum(token.log_probability or 0 for token in tokens[len(grpc.tokenize(start)) :]))
        assert found["ends"]["perplexity,none"] == pytest.approx(math.exp(-math.fsum(logs) / len(ends)), rel=1e-6)
        likeliest = grpc.generate(PROMPT, Sampling(max_tokens=1, temperature=0)).text == " ship"
        assert found["ends"]["acc,none"] == pytest.approx((1 + likeliest) / 3)
