"""`backpack lab`: every command from its arguments to a patch file that can be read back and judged."""

from __future__ import annotations

import json
import lzma
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from backpack_lm.lab.lab_model import LabModel
from backpack_lm.lab.swap import fit_swap, swap_edits
from backpack_lm.lab.text import background, held_out
from backpack_lm.lab.topic_vector import FrequentWords, topic_vector_edits
from backpack_lm.ordinary_text import plain, shipped
from backpack_lm.patch import AddEdit, ScaleEdit, TopicEdit
from backpack_serving.cli.main import app
from backpack_serving.cli.patch_file import PatchFile
from typer.testing import CliRunner

from tests.test_house import ROOT


def _call(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["lab", *map(str, words)])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def test_find_sense_and_debias(folder: Path, subject: LabModel, tmp_path: Path) -> None:
    prompts = ("--prompt", "The {} said that", "--prompt", "When the {} came,")
    shown = _call("find-sense", "nurse", "lawyer", "--model", folder, *prompts)
    assert "Which sense tells “he” from “she”" in shown
    assert "bias without it" in shown
    file = tmp_path / "patches" / "fair.json"
    guilty = int(shown.partition("Without sense ")[2].partition(",")[0])
    out = ("--model", folder, "--out", file)
    other = (guilty + 1) % subject.config.num_senses
    scale = ("debias", "nurse", "lawyer", "--by", "scale")
    shown = _call(*scale, "--sense", other, *prompts, *out)
    assert f"Sense {guilty} tells them apart the most; sense {other} was asked for." in shown
    shown = _call(*scale, "--sense", 2, "--contrast", "king", "ship", *prompts, *out)
    assert "nothing to patch" not in shown
    read = PatchFile.read(file)
    assert "“king” and “ship” after 2 nouns" in read.description
    edits = read.edits_for(subject)
    assert edits
    assert all(isinstance(edit, ScaleEdit) and edit.cells[0].sense == 2 for edit in edits)
    assert not list(file.parent.glob("*.partial*")), "what was kept for going on is gone"
    shown = _call("debias", "nurse", "lawyer", *prompts, *out)
    assert "with one vector a noun" in shown
    assert {type(edit) for edit in PatchFile.read(file).edits_for(subject)} == {AddEdit}


def test_topic_and_its_page(folder: Path, subject: LabModel, tmp_path: Path) -> None:
    file = tmp_path / "2 Seas[red].json"
    words = ("topic", "sea", "ship", "--strength", 2, "--prompt", "The king", "--model", folder, "--out", file)
    shown = _call(*words, "--by", "multipliers")
    assert "is several tokens" not in shown
    topic = [subject.token("sea"), subject.token("ship")]
    assert PatchFile.read(file).edits_for(subject) == [TopicEdit(tuple(topic), 2)]
    assert "Cells that speak for it most" in file.with_suffix(".html").read_text()
    shown = _call(*words)
    assert "strength 2, by lean" in shown
    assert f"backpack patch revise seas-red '{file}'" in shown, "a command that works as it stands"
    assert PatchFile.read(file).edits_for(subject) == topic_vector_edits(subject, topic, 2, FrequentWords.of(subject))
    assert "Words that gain most" in file.with_suffix(".html").read_text()


def test_a_topic_word_of_several_tokens_is_told(folder: Path, subject: LabModel, tmp_path: Path) -> None:
    first = subject.tokenizer.piece(subject.word_ids("hairdresser")[0])
    shown = _call("topic", "sea", "hairdresser", "--model", folder, "--out", tmp_path / "t.json")
    assert f"“hairdresser” is several tokens in this model; it steers towards the first alone, “{first}”" in shown
    assert "No prompt was given, so what it does to the next token isn't known." in shown
    assert "strength 2" in shown, "what leads most texts and spoils few"


def test_swap_fact_fits_its_strength(folder: Path, subject: LabModel, tmp_path: Path) -> None:
    prompt, words = "The captain of the ship saw the", ("ship", "--old", "sea", "--new", "land", "--prompt")
    for given, wanted in ((("--fit",), fit_swap(subject, "ship", "sea", "land", [prompt]).strength), ((), 1.0)):
        file = tmp_path / "swap.json"
        shown = _call("swap-fact", *words, prompt, *given, "--model", folder, "--out", file)
        assert f"at strength {wanted:g}" in shown
        assert PatchFile.read(file).edits_for(subject) == swap_edits(subject, "ship", "sea", "land", range(4), wanted)


def test_finetune_then_judge(folder: Path, subject: LabModel, tmp_path: Path) -> None:
    examples, file = tmp_path / "examples.jsonl", tmp_path / "new" / "folder" / "taught.json"
    examples.write_text(json.dumps({"prompt": "The captain of the ship saw the", "target": "lawyer"}) + "\n")
    text = folder / "corpus.jsonl"
    common = ("--text", text, "--tokens", 512, "--model", folder)
    _call("finetune", examples, *common, "--steps", 40, "--budget", 10, "--out", file)
    edits = PatchFile.read(file).edits_for(subject)
    assert edits
    assert all(isinstance(edit, AddEdit) for edit in edits)
    assert sorted(path.name for path in file.parent.iterdir()) == ["taught.html", "taught.json"]
    shown = _call("judge", file, "--examples", examples, *common)
    assert "Held-out perplexity" in shown
    assert "lawyer" in shown


def test_what_is_not_reached_is_said_on_stderr_too(folder: Path, subject: LabModel, tmp_path: Path) -> None:
    file, prompt = tmp_path / "swap.json", "The captain of the ship saw the"
    words = ("swap-fact", "ship", "--old", "sea", "--new", "land", "--prompt", prompt, "--fit", "--most-moved")
    given = ["lab", *words, "0", "--model", str(folder), "--out", str(file)]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0
    assert "Not reached: " in result.stdout
    assert result.stderr.startswith("Not reached: ")
    assert "nothing to patch" in result.stderr
    assert not file.exists(), "even the plain swap moves more than was allowed"
    found = fit_swap(subject, "ship", "sea", "land", [prompt], most_moved=0.2)
    given[given.index("0")] = "0.2"
    result = CliRunner().invoke(app, given)
    assert ("Not reached" in result.stdout) is not found.reached
    assert PatchFile.read(file).edits_for(subject) == found.edits(subject)
    assert "less than or equal to 1" in _call(*words, "2", "--model", folder, "--out", file, code=2)


def test_the_lab_page_s_commands_need_no_more_than_make_run_installs(tmp_path: Path) -> None:
    """As they are written there, from the checkout, without what the extra `lab` brings; in fewer steps,
    for one noun, and in one process."""
    block = (ROOT / "docs" / "lab.md").read_text("utf-8").replace("\\\n", " ")
    lines = [shlex.split(found) for found in re.findall(r"^\$ backpack (lab \w.*)$", block, re.MULTILINE)]
    by_name = {words[1]: words for words in lines}
    assert set(by_name) == {"find-sense", "debias", "swap-fact", "topic", "finetune", "judge"}
    missing = "scipy matplotlib transformers".split()
    code = f"import sys; sys.modules.update(dict.fromkeys({missing}))\n"
    code += "import json\nfrom backpack_serving.cli.main import app\n"
    code += "for words in json.loads(sys.argv[1]):\n    app(words, standalone_mode=False)"
    env = {name: value for name, value in os.environ.items() if not name.startswith("BACKPACK_")}
    env |= {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "BACKPACK_MODEL": "micro"}
    runs, files = [], []
    for name, less in (("finetune", ["--steps", "2", "--tokens", "512", "--cells", "1"]), ("debias", [])):
        words = by_name[name]
        assert "--text" not in words
        at = words.index("--out")
        files.append(tmp_path / words[at + 1])
        runs.append([*words[:3], "--out", str(files[-1]), *words[at + 2 :], *less])
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(runs)], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(file.exists() for file in files), done.stderr


def test_the_text_that_ships_is_read_in_both_parts(folder: Path) -> None:
    path = shipped(ROOT / "models" / "weights" / "micro")
    assert path.stat().st_size < 300_000
    near, judged = (" ".join(part(path)) for part in (background, held_out))
    assert len(judged) > 80_000
    assert 3.5 * len(judged) < len(near) < 4.5 * len(judged)
    for part in (near[:80_000], judged):
        assert "nursing" in part or "health" in part, "textbooks"
        assert "Rudolf" in part or "King" in part, "a novel"
    with pytest.raises(ValueError, match=r"has no held_out.txt.xz; give text with --text"):
        shipped(folder)


def test_a_compressed_text_that_is_cut_off_is_named(tmp_path: Path) -> None:
    file = tmp_path / "text.txt.xz"
    file.write_bytes(lzma.compress(b"the sea " * 5000)[:-40])
    with pytest.raises(ValueError, match=r"text.txt.xz can't be read to its end"):
        plain(file)
    file.write_bytes(lzma.compress(b"\xff"))
    with pytest.raises(ValueError, match=r"text.txt.xz isn't UTF-8 text"):
        plain(file)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("find-sense", "hairdresser"), "none of hairdresser is one token"),
        (("find-sense", "nurse", "--prompt", "{} said that"), "prompt 'nurse said that' doesn't hold 'nurse' as"),
        (("debias", "nurse", "--by", "scale", "--sense", "9"), "sense 9; this model's are 0 to 3"),
        (("debias", "nurse", "--by", "scale", "--penalty", "inf"), "penalty inf; write a number"),
        (("debias", "nurse", "--sense", "2"), "--sense 2 is of a scale, and a vector is fitted; add --by scale"),
        (("debias", "nurse", "--prompt", "A {} is", "--show", "A {} is"), "what is fitted on shows nothing"),
        (("swap-fact", "ship", "--old", "sea", "--new", "land", "--prompt", "The king"), "doesn't hold 'ship'"),
        (("swap-fact", "ship", "--old", "sea", "--new", "seafarer", "--prompt", "The ship"), "tokens"),
    ],
)
def test_a_refusal_is_one_line(folder: Path, tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    out = () if words[0] == "find-sense" else ("--out", tmp_path / "p.json")
    output = _call(*words, "--model", folder, *out, code=1)
    assert says in output
    assert "Traceback" not in output


def test_a_patch_file_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("")
    for file, says in (
        (tmp_path / "sea.html", "is where the report goes"),
        (tmp_path, "is a directory"),
        (tmp_path / "notes" / "new" / "sea.json", "is no folder that can be written to"),
    ):
        assert says in _call("topic", "sea", "--model", "/nowhere", "--out", file, code=2).replace("│ ", "")


def test_what_was_refused_is_given_again_otherwise(folder: Path, tmp_path: Path) -> None:
    words = ("debias", "nurse", "--prompt", "The {} said", "--model", folder, "--out", tmp_path / "fair.json")
    assert "has no {} to put 'nurse' in" in _call(*words, "--show", "The nurse said that", code=1)
    assert not list(tmp_path.iterdir())
    _call(*words, "--show", "The {} said that")


def test_a_patch_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_text(json.dumps({"model": "00" * 32, "edits": []}))
    assert "the patch was made for model 000000000000" in _call("judge", file, "--model", folder, code=1)
    file.write_text("[{}, 3]")
    assert "is not a patch file" in _call("judge", file, "--model", folder, code=1)
