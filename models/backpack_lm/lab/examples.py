"""Canonical examples: text, and what should come after it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from backpack_lm import strict_json
from backpack_lm.lab.lab_model import LabModel
from backpack_lm.ordinary_text import plain


@dataclass(frozen=True, slots=True)
class CanonicalExample:
    """Text, and what should come after it."""

    prompt: str
    target: str

    @classmethod
    def read(cls, file: Path) -> list[CanonicalExample]:
        """JSON lines with `prompt` and `target`. Raises ValueError naming the file or the line that isn't one."""
        found = []
        for number, line in enumerate(plain(file).split("\n"), 1):
            if not line.strip():
                continue
            try:
                values = strict_json.parse(line)
                prompt, target = values["prompt"], values["target"]
                if not (isinstance(prompt, str) and isinstance(target, str)):
                    raise TypeError("both must be text")
                found.append(cls(prompt, target))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f'{file}:{number}: not an example like {{"prompt": "The sea is", "target": "deep"}}: {error!r}'
                ) from None
        if not found:
            raise ValueError(f"{file} holds no examples")
        return found

    def ids(self, subject: LabModel) -> tuple[list[int], int]:
        """Ids of prompt and target, their last ones if they are more than the context holds, and the index of the
        first of the target. Raises ValueError for a target that leaves the prompt no room."""
        prompt, target = subject.ids(self.prompt), list(subject.word_ids(self.target))
        if len(target) >= subject.config.n_positions:
            raise ValueError(
                f"the target of {self.prompt!r} has {len(target)} tokens; the context holds "
                f"{subject.config.n_positions}, the prompt among them"
            )
        ids = (prompt + target)[-subject.config.n_positions :]
        return ids, len(ids) - len(target)
