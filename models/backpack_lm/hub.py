"""Checkpoints on the Hugging Face hub, by name and revision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from backpack_lm.config import read_object
from backpack_lm.layouts import CheckpointError
from backpack_lm.manifest import TOKENIZER, file_digest

_FORMATS = ("*.safetensors",), ("pytorch_model*.bin", "*.ckpt")
_MORE = ("*.json", "*.jinja")
_GPT2, _SIZES_OF_GPT2 = "openai-community/gpt2", (50257, 50264)


def fetch(name: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint's files in the hub's own cache: downloaded, or there from before.

    Resumes partial downloads. Of a checkpoint in several formats the safetensors are taken, and only files beside its
    config.json. Files that the hub tells a SHA-256 of are checked. A token is read from its usual place (HF_TOKEN,
    `hf auth login`).

    Raises CheckpointError with what can be done: no network, no such name or revision, no right to it, a damaged file.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    with _explained(name, revision):
        try:
            info = HfApi().model_info(name, revision=revision, files_metadata=True)
        except (HfHubHTTPError, HFValidationError):  # the hub's own answer
            raise
        except Exception as error:  # of the HTTP client, which has many kinds
            return _fetched_before(name, revision, error)
        files = {Path(file.rfilename): file for file in info.siblings or () if "/" not in file.rfilename}
        kept = [path for path in files if any(map(path.match, _FORMATS[0]))]
        kept = kept or [path for path in files if any(map(path.match, _FORMATS[1]))]
        wanted = [str(path) for path in (*kept, *(path for path in files if any(map(path.match, _MORE))))]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    for path in map(Path, wanted):
        known = files[path].lfs
        if known and file_digest(folder / path) != known.sha256:
            (folder / path).resolve().unlink()
            raise CheckpointError(f"{folder / path} isn't what the hub says it is, and was removed; try again")
    return folder


def _fetched_before(name: str, revision: str | None, error: Exception) -> Path:
    """What lies in the hub's cache. Raises CheckpointError if nothing of it does."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    for patterns in _FORMATS:
        try:
            kept = snapshot_download(name, revision=revision, allow_patterns=[*patterns, *_MORE], local_files_only=True)
        except LocalEntryNotFoundError:
            continue
        if any(file for pattern in patterns for file in Path(kept).glob(pattern)):
            return Path(kept)
    raise CheckpointError(
        f"the hub can't be reached ({type(error).__name__}), and {name} wasn't fetched before; where there is a "
        f"network, `hf download {name} --local-dir FOLDER`, then copy FOLDER here and give that instead"
    )


@contextmanager
def _explained(name: str, revision: str | None) -> Iterator[None]:
    """Errors of the hub's client, with the fix."""
    from huggingface_hub import errors

    try:
        yield
    except CheckpointError:
        raise
    except errors.HFValidationError:
        raise CheckpointError(f"{name!r} is no name on the hub; write it as in stanfordnlp/backpack-gpt2") from None
    except errors.GatedRepoError:
        raise CheckpointError(f"access to {name} is restricted: request it on the hub, then `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{name} has no revision {revision}") from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(f"the hub has no {name}, or it is private: check the name, or `hf auth login`") from None
    except Exception as error:  # of many kinds, those of its HTTP client among them
        raise CheckpointError(f"{name} couldn't be fetched ({error}); try again: it resumes") from None


def tokenizer_of_gpt2(checkpoint: Path) -> Path:
    """The tokenizer.json of a Backpack that was published without one. Raises CheckpointError if it isn't GPT-2's."""
    from huggingface_hub import hf_hub_download

    size = read_object(checkpoint / "config.json").get("vocab_size")
    if size not in _SIZES_OF_GPT2:
        raise CheckpointError(f"{checkpoint} has no {TOKENIZER}, and {size} tokens: not GPT-2's; give --tokenizer")
    try:
        return Path(hf_hub_download(_GPT2, TOKENIZER))
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint} has no {TOKENIZER}, and {_GPT2}'s can't be fetched ({type(error).__name__}); "
            "give --tokenizer"
        ) from None
