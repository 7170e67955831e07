"""Checkpoints on the Hugging Face hub, by name and revision."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from backpack_lm.layouts import CheckpointError
from backpack_lm.manifest import TOKENIZER, file_digest

_FORMATS = (".safetensors",), (".bin", ".ckpt")
_MORE = (".json", ".jinja")
_GPT2 = "openai-community/gpt2"


def fetch(name: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint's files in the hub's own cache: fetched, or there from before.

    What was fetched in part is gone on with. Of a checkpoint in several formats the safetensors are taken. Files that
    the hub knows a SHA-256 of are checked. A token is read from its usual place (HF_TOKEN, `hf auth login`).

    Raises CheckpointError with what can be done: no network, no such name or revision, no right to it, a damaged file.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
    except HFValidationError:
        raise CheckpointError(f"{name!r} is no name on the hub; write it as in stanfordnlp/backpack-gpt2") from None
    except GatedRepoError:
        raise CheckpointError(f"{name}: its owner gives it to whom he knows; ask there, then `hf auth login`") from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{name} has no revision {revision}") from None
    except RepositoryNotFoundError:
        raise CheckpointError(f"the hub has no {name}, or it is private: check the name, or `hf auth login`") from None
    except Exception as error:  # of the HTTP client's many kinds
        for kept_as in _FORMATS:
            kept = [f"*{ending}" for ending in (*kept_as, *_MORE)]
            with suppress(LocalEntryNotFoundError):
                found = Path(snapshot_download(name, revision=revision, allow_patterns=kept, local_files_only=True))
                if any(file.suffix in kept_as for file in found.iterdir()):
                    return found
        else:
            raise CheckpointError(
                f"the hub can't be reached ({type(error).__name__}), and {name} wasn't fetched before; where there is "
                f"a network, `hf download {name} --local-dir FOLDER`, then copy FOLDER here and give that instead"
            ) from None
    files = [sibling.rfilename for sibling in info.siblings or ()]
    safe, pickled = _FORMATS
    endings = safe if any(file.endswith(safe) for file in files) else pickled
    wanted = [file for file in files if file.endswith(endings) or file.endswith(_MORE)]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as error:
        raise CheckpointError(f"{name} couldn't be fetched whole ({error}); try again, it goes on there") from None
    for sibling in info.siblings or ():
        path = folder / sibling.rfilename
        if sibling.lfs and path.exists() and file_digest(path) != sibling.lfs.sha256:
            path.resolve().unlink()
            raise CheckpointError(f"{path} wasn't what the hub says it is, and was removed; try again")
    return folder


def tokenizer_of_gpt2() -> Path:
    """The tokenizer.json that published Backpacks have, where theirs has none beside it. Raises CheckpointError."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(_GPT2, TOKENIZER))
    except Exception as error:
        raise CheckpointError(
            f"it has no {TOKENIZER}, and {_GPT2}'s can't be fetched ({type(error).__name__}); give one with --tokenizer"
        ) from None
