"""The commands that the README shows, against a running system."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backpack_lm.installed import folder_of
from backpack_serving.cli.main import app
from backpack_serving.client import Scale, Steering
from backpack_serving.install import install_command
from safetensors.numpy import save_file
from typer.testing import CliRunner

from tests.conftest import free_port
from tests.e2e.conftest import RUN
from tests.e2e.starts import read_until_served


def test_run_shows_both_tenants_and_how_to_call(environment: dict[str, str]) -> None:
    shown = environment["SHOWN"]
    assert re.search(r"clinic: .*harbour: ", shown)
    digests = re.search(r"release 1, ([0-9a-f]{12}).*release 1, ([0-9a-f]{12})", shown)
    assert digests is not None
    assert digests[1] != digests[2]
    for way in ("From the command line", "From Python", "grpcurl -plaintext"):
        assert way in shown


def test_a_probe_and_a_call_reach_this_machine_whatever_proxy_there_is(
    backpack: Any, environment: dict[str, str]
) -> None:
    assert os.environ["http_proxy"] == "http://127.0.0.1:1"
    for part in ("GATEWAY", "INTERVENTIONS"):
        assert "SERVING" in backpack("health", environment[f"BACKPACK_{part}_ADDRESS"])
    assert "The story" in backpack("generate", "The story", "--max-tokens", "2")


def test_a_model_that_the_examples_are_not_for_is_served(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"alpha {n} beta"}) + "\n" for n in range(400)))
    sizes = "--layers 1 --heads 2 --width 16 --senses 2 --context 32 --vocabulary 300 --tokens-per-step 64".split()
    words = ["train", str(tmp_path / "text.jsonl"), "--out", str(tmp_path), "--steps", "1", *sizes]
    assert CliRunner().invoke(app, words).exit_code == 0
    own = {
        "BACKPACK_STATE": str(tmp_path / "state"),
        "BACKPACK_MODEL": str(tmp_path / "model"),
        "BACKPACK_GATEWAY_ADDRESS": f"127.0.0.1:{free_port()}",
        "BACKPACK_INTERVENTIONS_ADDRESS": f"127.0.0.1:{free_port()}",
    }
    with subprocess.Popen(
        RUN,
        env={**os.environ, **environment, **own, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        shown = read_until_served(process)
        process.terminate()
        assert "Finishing" in process.stdout.read()
    assert "The examples aren't for this model: edits[0].copy.source: 'doctor' is" in shown
    assert process.returncode == 0


def _python_example(shown: str) -> str:
    code = shown.split("From Python:")[1].split("With grpcurl:")[0]
    return "\n".join(line[4:] for line in code.splitlines())


def test_the_python_that_run_prints_works(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _python_example(environment["SHOWN"])],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout, "of no seed: it may end soon, but hardly at once"


def test_the_readme_shows_the_same_python(environment: dict[str, str]) -> None:
    code = _python_example(environment["SHOWN"])
    for here, there in (
        (environment["BACKPACK_GATEWAY_ADDRESS"], "127.0.0.1:8470"),
        (environment["BACKPACK_STATE"] + "/", "var/"),
    ):
        code = code.replace(here, there)
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    assert f"```python\n{code.strip()}\n```" in readme


def test_the_grpcurl_that_run_prints_works(environment: dict[str, str]) -> None:
    command = environment["SHOWN"].split("With grpcurl:")[1].split("Serving until")[0]
    folder = str(Path(sys.executable).parent)
    done = subprocess.run(
        ["/bin/sh", "-c", command],
        env={**os.environ, "PATH": folder + os.pathsep + os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["served"]["tenant"] == "harbour"


def test_generate_is_seeded_and_says_what_steered_it(backpack: Any) -> None:
    first, second = (backpack("generate", "The king", "--as", "harbour", "--seed", "3") for _ in range(2))
    assert first == second
    assert "harbour/live, release 1" in first
    assert "clinic/live, release 1" in backpack("generate", "The king", "--as", "clinic", "--max-tokens", "3")


def test_generate_holds_texts_to_a_form(backpack: Any, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"type": "array", "items": {"enum": ["king", "ship"]}, "maxItems": 2}')
    (tmp_path / "answer.lark").write_text('start: " yes" | " no"')
    asked = ("generate", "The king", "--as", "harbour", "--seed", "3")
    text = backpack(*asked, "--json-schema", str(tmp_path / "schema.json"))
    assert re.match(r'The king\[("(king|ship)"(, "(king|ship)")?)?\]\n', text)
    assert re.match("The king (yes|no)\n", backpack(*asked, "--grammar", str(tmp_path / "answer.lark")))
    assert re.match("The king, [a-z]{3}\n", backpack(*asked, "--regex", ", [a-z]{3}"))


def test_a_patch_from_a_word_to_a_steered_answer_and_back(backpack: Any, tmp_path: Path) -> None:
    assert "tenants/lab" in backpack("tenant", "create", "lab")
    assert "tenants/lab" in backpack("tenant", "list")
    backpack("patch", "copy", "royal", "king", "--from", "court", "--senses", "0,3-5", "--as", "lab")
    backpack("patch", "topic", "royal", "court", "law", "--as", "lab")
    assert "topic" in json.loads(backpack("patch", "show", "royal", "--as", "lab"))[0], "the newest revision"
    shown = json.loads(backpack("patch", "show", "royal", "1", "--as", "lab"))
    assert json.loads(backpack("patch", "show", "royal:1", "--as", "lab")) == shown
    assert shown[0]["copy"]["cells"][0]["senses"] == [0, 3, 4, 5]
    (tmp_path / "edits.json").write_text(json.dumps(shown))
    revised = backpack("patch", "revise", "royal", str(tmp_path / "edits.json"), "--as", "lab")
    assert "royal/revisions/3" in revised
    several = {"text": "kingdomless", "policy": "WORD_POLICY_ALL_TOKENS"}  # as a refusal advises
    cells = [{"word": several, "senses": [0]}]
    (tmp_path / "several.json").write_text(json.dumps([{"scale": {"cells": cells, "factor": 0}}]))
    assert "would be" in backpack(
        "patch", "revise", "royal", str(tmp_path / "several.json"), "--dry-run", "--as", "lab"
    )
    assert "would be" in backpack("patch", "revise", "royal", str(tmp_path / "edits.json"), "--dry-run", "--as", "lab")
    for edit in (
        ("scale", "royal", "king", "--factor", "0"),
        ("swap", "royal", "king", "--old", "king", "--new", "court"),
        ("project-out", "royal", "king", "--direction", "court"),
    ):
        backpack("patch", *edit, "--as", "lab")
    assert "is at release 1" in backpack("release", "create", "royal:1", "royal:2", "--activate", "--as", "lab")
    listed = backpack("release", "list", "--as", "lab")
    assert "royal:1 royal:2" in listed
    assert "is at release 0" in backpack("release", "rollback", "--as", "lab")
    assert "is at release 1" in backpack("release", "activate", "1", "--as", "lab")
    assert "intact" in backpack("audit", "--limit", "1000000", "--as", "lab")
    assert "6" in backpack("patch", "list", "--as", "lab")


def test_a_finetuned_patch_is_uploaded_described_and_deleted(backpack: Any, tmp_path: Path) -> None:
    backpack("tenant", "create", "tuner")
    width = json.loads((folder_of("micro") / "config.json").read_text())["n_embd"]
    vectors = np.full((3, width), 0.01, np.float32)
    save_file(
        {"tokens": np.array([5, 6, 7]), "senses": np.array([0, 1, 2], np.int32), "vectors": vectors},
        tmp_path / "tuned.safetensors",
    )
    file = str(tmp_path / "tuned.safetensors")
    tried = backpack("patch", "upload", "tuned", file, "--dry-run", "--as", "tuner")
    assert tried == "would be the first revision of a new patch, tuned\n", "and no bar where there is no terminal"
    bad = str(tmp_path / "bad.safetensors")
    save_file({"tokens": np.array([99999]), "senses": np.array([0]), "vectors": vectors[:1]}, bad)
    for way in (("--dry-run",), ()):
        refused = backpack("patch", "upload", "tuned", bad, *way, "--as", "tuner", code=1)
        assert "99999" in refused
    assert "tuned" not in backpack("patch", "list", "--as", "tuner"), "a name is never taken for nothing"
    assert "tuned/revisions/1" in backpack("patch", "upload", "tuned", file, "--as", "tuner")
    assert "would be" in backpack("patch", "upload", "tuned", file, "--dry-run", "--as", "tuner")
    assert "tuned/revisions/2" in backpack("patch", "upload", "tuned", file, "--set", "--as", "tuner")
    backpack("patch", "describe", "tuned", "# from a run of finetuning\n\nwith *care*", "--as", "tuner")
    listed = backpack("patch", "list", "--as", "tuner")
    assert " from a run of finetuning" in listed
    assert "care" not in listed, "the first line is enough for a list"
    described = backpack("patch", "describe", "tuned", "--as", "tuner")
    assert described == "# from a run of finetuning\n\nwith *care*\n", "a pipe gets what was written"
    assert "is deleted" in backpack("patch", "delete", "tuned", "--as", "tuner")
    assert "from a run" not in backpack("patch", "list", "--as", "tuner")
    for way in (("--dry-run",), ()):
        assert "PATCH_DELETED" in backpack("patch", "upload", "tuned", file, *way, "--as", "tuner", code=1)
        edits = str(tmp_path / "edits.json")
        word = {"word": {"text": "king"}}
        Path(edits).write_text(json.dumps({"edits": [{"scale": {"cells": [word], "factor": 0}}], "model": None}))
        assert "PATCH_DELETED" in backpack("patch", "revise", "tuned", edits, *way, "--as", "tuner", code=1)
    assert "revisions/1" in backpack("patch", "revise", "undescribed", edits, "--as", "tuner")


@pytest.mark.parametrize("name", ["admin", "replica", "harbour"])
def test_a_new_tenant_takes_nobodys_key_away(backpack: Any, environment: dict[str, str], name: str) -> None:
    file = Path(environment["BACKPACK_STATE"]) / f"{name}.key"
    before = file.read_text()
    assert "its key would be lost" in backpack("tenant", "create", name, code=1)
    assert file.read_text() == before
    assert f"tenants/{name}  " not in backpack("tenant", "list").replace("tenants/harbour", "")


def test_an_operators_machine_needs_no_state_folder(
    backpack: Any, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BACKPACK_ADMIN_KEY", (Path(environment["BACKPACK_STATE"]) / "admin.key").read_text().strip())
    monkeypatch.setenv("BACKPACK_STATE", str(tmp_path / "not" / "yet"))
    assert "its key is in" in backpack("tenant", "create", "laptop")
    assert "release" in backpack("release", "list", "--as", "laptop")


def test_keys_are_rotated_and_tenants_suspended(backpack: Any) -> None:
    backpack("tenant", "create", "shop")
    (made,) = re.findall("^ *([0-9a-f]{12}) ", backpack("tenant", "keys", "shop"), re.M)
    assert backpack("tenant", "rotate", "shop", made).startswith("bp_")
    listed = backpack("tenant", "keys", "shop")
    assert re.search(f"{made} .*revoked", listed)
    (other,) = set(re.findall("^ *([0-9a-f]{12}) ", listed, re.M)) - {made}
    assert "is revoked" in backpack("tenant", "revoke", "shop", other)
    assert "suspended" in backpack("tenant", "suspend", "shop")
    assert re.search("tenants/shop .*suspended", backpack("tenant", "list"))
    assert "resumed" in backpack("tenant", "resume", "shop")


def test_compare_releases(backpack: Any) -> None:
    shown = backpack("compare", "The story of the horse and the", "--target", "ship", "--as", "harbour")
    assert re.search(r"release +log p +perplexity +p\(' ship'\) +likeliest next", shown)
    rows = re.findall(r"^ (.*) \(([0-9a-f]{8})\) +(-\d+\.\d+) +(\d+\.\d+) +(\d+\.\d+) % ", shown, re.M)
    (plain, steered) = rows
    assert (plain[0], steered[0]) == ("unpatched", "live, 1")
    assert float(steered[4]) > 1.5 * float(plain[4])
    scored = backpack("score", "The story of the horse and the", "--as", "harbour")
    assert f"log p {steered[2]}, perplexity {steered[3]}" in scored
    choices = ("--release", "0-1", "--release", "live")
    shown = backpack("compare", "The king", *choices, "--score", "--as", "harbour")
    assert "3 releases of harbour" in shown
    assert len(re.findall(r" (\d|live, \d|unpatched) \(", backpack("compare", "The king", *choices))) == 3
    assert "–" in backpack("compare", "king"), "one token has no likelihood, but a next one"
    assert "write 1-8" in backpack("compare", "The king", "--release", "9-3", code=2)
    assert "releases/99 doesn't exist" in backpack("compare", "The king", "--release", "99", code=1)


def test_generate_shows_the_prompts_log_probabilities(backpack: Any) -> None:
    asked = ("generate", "The king and the", "--max-tokens", "3", "--seed", "1")
    plain, shown = backpack(*asked), backpack(*asked, "--prompt-log-probabilities", "2")
    assert shown.startswith(plain.splitlines()[0])
    rows = [line.rstrip() for line in backpack("score", "The king and the").splitlines()[1:5]]
    assert [line[: len(rows[1])].rstrip() for line in shown.splitlines()[2:6]] == rows
    assert shown.splitlines()[3].count(" %") == 2


def test_generate_explains_each_token(backpack: Any) -> None:
    shown = backpack("generate", "The king and the", "--max-tokens", "3", "--explain", "2", "--as", "harbour")
    assert shown.count(" all others") == 3
    terms = re.findall(r"([+-]\d+\.\d+)  '.*?' +(\d+) +(\d+)  █", shown)
    assert len(terms) == 6
    assert all(int(position) < 6 and int(sense) < 16 for _, position, sense in terms)


def test_samples_are_what_their_seeds_give(backpack: Any) -> None:
    words = ("generate", "The king and the", "--max-tokens", "8", "--as", "harbour", "--priority", "3")
    shown = backpack(*words, "--seed", "4", "--samples", "2", "--explain", "1")
    assert "4 + 16 tokens" in shown
    for number in range(2):
        alone = backpack(*words, "--seed", str(4 + number)).split("\n")[0].removeprefix("The king and the")
        assert f"{number}  {alone}" in shown
        assert f"sample {number}" in shown
    assert "less than or equal to 16" in backpack(*words, "--samples", "17", code=2)
    assert "less than or equal to 100" in backpack(*words, "--priority", "200", code=2)


def test_a_canary_is_started_watched_promoted_and_rolled_back(backpack: Any) -> None:
    backpack("tenant", "create", "trial")
    backpack("patch", "copy", "royal", "king", "--from", "court", "--as", "trial")
    backpack("release", "create", "royal:1", "--as", "trial")
    started = backpack("canary", "start", "1", "--permille", "400", "--salt", "s[/b]", "--wait", "all", "--as", "trial")
    assert "canary: release 1 for 400 in a thousand request keys, salt s[/b]" in started
    assert "held by 1 of 1 replicas, 1 of 1 gateways" in started
    status = backpack("release", "status", "--wait", "all", "--as", "trial")
    assert status.count("acked") == 4, "a replica and a gateway, the release and the canary"
    under = [
        "the canary" in backpack("generate", "The king", "--max-tokens", "1", "--request-key", key, "--as", "trial")
        for key in ("a", "b", "c", "d", "e", "f")
    ]
    assert set(under) == {True, False}
    assert "is at release 1 (before: 0)" in backpack("canary", "promote", "--wait", "quorum", "--as", "trial")
    assert "is at release 0" in backpack("release", "rollback", "--wait", "all", "--as", "trial")
    assert "has no canary" in backpack("canary", "abort", "--as", "trial", code=1)
    assert "replica" in backpack("fleet")


def test_a_release_is_asked_for_by_its_number(backpack: Any) -> None:
    asked = ("The story of the horse and the", "--as", "harbour", "--release")
    for command in (("generate", "--max-tokens", "2"), ("explain",), ("score",)):
        for number in ("0", "1"):
            assert f"harbour, release {number} (" in backpack(*command, *asked, number)
    assert "edited" not in backpack("senses", "horse", "--as", "harbour", "--release", "0")
    missing = backpack("score", *asked, "99", code=1)
    assert "releases/99 doesn't exist; `backpack release list` lists what there is" in " ".join(missing.split())
    for command in (("generate",), ("score",), ("explain",), ("senses",)):
        for both in (("--release", "1", "--channel", "live"), ("--channel", "live", "--release", "0")):
            refused = backpack(*command, "horse", *both, code=2)
            assert "--channel and --release each name a release; give one" in refused
    assert "greater than or equal to 0" in backpack("score", *asked, "-1", code=2)


def test_explain_senses_and_score(backpack: Any) -> None:
    assert "logit of" in backpack("explain", "The king and the", "--as", "harbour")
    assert "edited" in backpack("senses", "horse", "--as", "harbour")
    assert "perplexity" in backpack("score", "The king and the queen", "--as", "harbour")


def test_a_key_is_one_line_however_narrow_the_terminal(backpack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backpack_serving.cli.client.out._width", 80)
    assert re.fullmatch(
        r"bp_[0-9a-f]{12}_[0-9a-f]{64}_[0-9a-f]{8}\n", backpack("tenant", "key", "harbour", "--role", "caller")
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("generate", ""), "give a text or token ids"),
        (("generate", "king " * 600), "601 tokens; the context holds 512"),
        (("generate", "x", "--samples", "2", "--max-tokens", "600"), "together at most 512"),
        (("generate", "x", "--as", "nobody"), "or log in, which keeps a key for every folder: backpack login"),
        (("generate", "x", "--key", "bp_wrong"), "copy it whole"),
        (("generate", "x", "--channel", "beta"), "activate a release on it"),
        (("senses", "kingdomless"), "choose another word"),
        (("patch", "scale", "p", "kingdomless", "--factor", "0"), "choose another word, or ask for its first token"),
        (("patch", "upload", "p", __file__), "no safetensors file, or one with a header of"),
        (("release", "activate", "99"), "releases/99 doesn't exist"),
        (("release", "create", "royal"), "'royal'; write PATCH:NUMBER, such as debias:3"),
        (("model", "verify", "/nowhere"), "backpack model import"),
    ],
)
def test_a_refusal_is_one_line(
    backpack: Any, words: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKPACK_TENANT", "harbour")
    (line,) = [line for line in backpack(*words, code=1).splitlines() if line.startswith("error: ")]
    assert says in line


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "Expecting property name"),
        pytest.param("[" * 100_000, "brackets nest too deeply", id="deep"),
        ("[]", "EMPTY: edits: a revision needs at least one edit"),
        ('{"edits": "x"}', "no list of edits"),
        ('[{"scale": {"factr": 0}}]', 'no field named "factr"'),
        ('[{"scale": {"cells": [{"word": {"text": "king"}, "senses": [99]}]}}]', "senses are 0 to 7"),
    ],
)
def test_a_bad_patch_file_is_one_line_and_makes_no_patch(
    backpack: Any, tmp_path: Path, text: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKPACK_TENANT", "harbour")
    file = tmp_path / "patch.json"
    file.write_text(text)
    output = backpack("patch", "revise", "mistake", str(file), code=1)
    assert output.startswith("error: ")
    assert output.count("\n") == 1
    assert says in output
    assert "mistake" not in backpack("patch", "list")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("patch", "scale", "p", "king", "--factor", "0", "--senses", "5-1"), "'5-1' names no sense"),
        (("patch", "scale", "p", "king", "--factor", "0", "--senses", "²"), "'²' names no sense"),
        (("patch", "scale", "p", "king", "--factor", "0", "--senses", "0-99999"), "'0-99999' names no sense"),
        (("patch", "bias", "p", "king"), "give one of --by AMOUNT and --never"),
        (("patch", "bias", "p", "king", "--by", "1", "--never"), "give one of --by AMOUNT and --never"),
        (("compare", "x", "--release", ""), "write a number"),
        (("explain", "x", "--html", "/nowhere/x.html"), "/nowhere is no folder"),
        (("explain", "x", "--html", "/tmp"), "'/tmp' is a directory"),
        (("explain", "x", "--html", "x.html", "--target", "sea"), "--target: a page explains each token of a"),
        (("tenant", "key", "harbour", "--role", "king"), "'author', 'releaser', 'caller'"),
        (("patch", "revise", "p", "/nowhere.json"), "does not exist"),
        (("release", "rollback", "--wait", "some"), "'none', 'quorum', 'all'"),
        (("model", "prepare", "--precision", "half"), "'float32', 'bfloat16', 'int8'"),
    ],
)
def test_wrong_use_names_the_value_and_the_fix(backpack: Any, words: tuple[str, ...], says: str) -> None:
    assert says in " ".join(backpack(*words, code=2).split())


@pytest.mark.parametrize("words", [("generate", "x"), ("compare", "x"), ("patch", "list")])
def test_a_server_that_is_away_is_one_line(
    backpack: Any, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    for part in ("GATEWAY", "INTERVENTIONS"):
        monkeypatch.setenv(f"BACKPACK_{part}_ADDRESS", "127.0.0.1:1")
    output = backpack(*words, code=1)
    assert output.count("\n") == 1
    assert "is the gateway at 127.0.0.1:1 running" in output


def test_settings_that_do_not_fit_are_named(backpack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKPACK_DATABASE", "postgresql://me:secret@host/name")
    shown = backpack("settings")
    assert "postgresql://me:***@host/name" in shown
    assert "secret@" not in shown
    monkeypatch.setenv("BACKPACK_SLOTS", "many")
    assert "BACKPACK_SLOTS=many: Input should be a valid integer" in backpack("patch", "list", code=1)
    monkeypatch.delenv("BACKPACK_SLOTS")
    monkeypatch.setenv("BACKPACK_CERTIFICATES", '{"a.example": {"tenant": "clinic"}}')
    assert "BACKPACK_CERTIFICATES, a.example, roles=" in backpack("patch", "list", code=1)


def test_training_on_a_file_that_is_not_there(backpack: Any, tmp_path: Path) -> None:
    output = backpack("train", "/nowhere", "--out", str(tmp_path / "run"), "--steps", "1", code=1)
    assert output.splitlines()[-1] == "error: /nowhere: No such file or directory"


def test_a_replica_without_torch_says_what_is_missing() -> None:
    code = "import sys; sys.modules['torch'] = None; from backpack_serving.cli.main import app; app()"
    words, path = [sys.executable, "-c", code, "serve", "inference"], {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(words, env={**os.environ, **path}, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: this needs torch: {install_command('engine')}")


def test_the_version_is_told(backpack: Any) -> None:
    assert re.fullmatch(r"backpack-serving \d+\.\d+\.\d+\n", backpack("--version"))


def test_the_default_model_is_intact_and_settings_are_listed(backpack: Any) -> None:
    assert "intact" in backpack("model", "verify")
    assert "BACKPACK_GATEWAY_ADDRESS" in backpack("settings")


def test_help_teaches(backpack: Any) -> None:
    shown = backpack("--help")
    for command in (
        "run",
        "serve",
        "generate",
        "patch",
        "release",
        "canary",
        "fleet",
        "train",
        "lab",
        "experiment",
    ):
        assert command in shown
    assert "between <!-- run --> and <!-- /run -->, <!-- senses --> and" in backpack("model", "card", "--help")


def test_a_topic_word_of_several_tokens_is_told(backpack: Any) -> None:
    said = backpack("patch", "topic", "nautical", "sea", "kingdomless", " ship", "sea", "--as", "harbour")
    assert "several tokens in this model: kingdomless; the topic steers towards the first of each" in said
    assert "several" not in backpack("patch", "topic", "nautical", "sea", " ship", "sea", "--as", "harbour")


def test_releases_are_listed_to_the_first(backpack: Any, environment: dict[str, str]) -> None:
    backpack("tenant", "create", "busy")
    key = (Path(environment["BACKPACK_STATE"]) / "busy.key").read_text()
    with Steering(environment["BACKPACK_INTERVENTIONS_ADDRESS"], key) as steering:
        steering.create_patch("p")
        revision = steering.create_revision("p", [Scale("king", 0.5)])
        for _ in range(101):
            steering.create_release([revision])
    assert len(re.findall(r"^ \d+ ", backpack("release", "list", "--as", "busy"), re.M)) == 102


def test_a_patch_from_the_lab_is_uploaded_with_its_report_and_steers(backpack: Any, tmp_path: Path) -> None:
    file = tmp_path / "ships.json"
    prompt = "The captain of the ship and the"
    shown = backpack(
        *("lab", "swap-fact", "ship", "--old", "sea", "--new", "land", "--prompt", prompt, "--out", str(file))
    )
    assert "backpack patch revise ships" in shown
    assert "land, before" in shown
    backpack("tenant", "create", "lab-user")
    tried = backpack("patch", "revise", "ships", str(file), "--dry-run", "--as", "lab-user")
    assert "would be the first revision of a new patch, ships" in tried
    assert "ships" not in backpack("patch", "list", "--as", "lab-user")
    assert "ships/revisions/1" in backpack("patch", "revise", "ships", str(file), "--as", "lab-user")
    assert "“ship” says “land”" in backpack("patch", "list", "--as", "lab-user")
    backpack("release", "create", "ships:1", "--activate", "--wait", "all", "--as", "lab-user")
    assert "edited" in backpack("senses", "ship", "--as", "lab-user")
    judged = backpack("lab", "judge", str(file), "--prompt", prompt, "--html", str(tmp_path / "judged.html"))
    assert "1 edit of 8 cells" in judged
    assert "<table>" in (tmp_path / "judged.html").read_text()

    other = json.loads(file.read_text()) | {"model": "00" * 32}
    file.write_text(json.dumps(other))
    refused = backpack("patch", "revise", "ships", str(file), "--as", "lab-user", code=1)
    assert "the patch was made for model 000000000000" in " ".join(refused.split())
    file.write_text("{}")
    assert "is not a patch file" in backpack("patch", "revise", "ships", str(file), "--as", "lab-user", code=1)


def test_a_page_of_a_word_and_of_a_generation(backpack: Any, tmp_path: Path) -> None:
    page = tmp_path / "word.html"
    assert "near" in backpack("senses", "ship", "--html", str(page), "--as", "clinic")
    shown = page.read_text()
    assert shown.count("<section class=sense>") == 8
    assert ">boat<" in shown, "a neighbour of ship"
    assert "near" not in backpack("senses", "ship", "--as", "clinic").split("\n")[0]

    page = tmp_path / "text.html"
    prompt = ("The story of the king and the", "--seed", "3", "--max-tokens", "5", "--as", "harbour")
    made, generated = (
        next(line for line in shown.splitlines() if line.startswith(prompt[0]))
        for shown in (backpack("explain", *prompt, "--html", str(page)), backpack("generate", *prompt))
    )
    assert made == generated, "the text that is explained is the text that is made"
    data = json.loads(re.search(r"const DATA = (.*);\n", page.read_text())[1])  # type: ignore[index]
    assert "".join(data["prompt"]) == prompt[0]
    assert "".join(step["token"] for step in data["steps"]) == made.removeprefix(prompt[0])
    for number, step in enumerate(data["steps"]):
        total = sum(term["contribution"] for term in step["terms"]) + step["unlisted"]
        assert total == pytest.approx(step["logit"], abs=1e-3)
        assert len(step["terms"]) == 8 * (len(data["prompt"]) + number), "every term is listed while they are few"
