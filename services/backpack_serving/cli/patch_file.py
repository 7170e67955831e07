"""A patch as a file: what the lab writes, and `backpack patch revise` uploads.

    {"description": "…", "model": "<fingerprint>", "edits": [{"scale": {…}}, …]}

The edits are the API's messages in protobuf's JSON, as `backpack patch show` prints them; a word may be a plain string.
That list alone is a patch file, too. With `model`, a server of another one refuses the file: token ids and vectors
are one model's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from backpack_lm import strict_json
from backpack_proto.v1 import interventions_pb2 as pb
from google.protobuf import json_format

from backpack_serving.wire.edit_json import parse_edit_json
from backpack_serving.wire.edits import read_edits, write_edit

if TYPE_CHECKING:
    from backpack_lm.lab.lab_model import LabModel
    from backpack_lm.patch import Edit


@dataclass(frozen=True, slots=True)
class PatchFile:
    """Edits as messages, what they are for, and the fingerprint of the model that they are for, if it is known."""

    edits: tuple[pb.Edit, ...]
    description: str = ""
    model: str = ""

    @classmethod
    def read(cls, file: Path) -> PatchFile:
        """Raises ValueError, naming the file, if it isn't one."""
        try:
            values = strict_json.read(file)
            values = {"edits": values} if isinstance(values, list) else values
            if not (isinstance(values, dict) and isinstance(values.get("edits"), list)):
                raise ValueError('no list of edits, nor an object with one as "edits"')
            edits = tuple(map(parse_edit_json, values["edits"]))
            description, model = (str(values.get(name) or "") for name in ("description", "model"))
            return cls(edits, description, model)
        except ValueError as error:
            why = str(error)
        raise ValueError(f"{file} is not a patch file: {why}; `backpack patch show` and `backpack lab` make them")

    @classmethod
    def of(cls, subject: LabModel, edits: Sequence[Edit], description: str) -> PatchFile:
        messages = tuple(write_edit(edit, subject.tokenizer) for edit in edits)
        return cls(messages, description, subject.manifest.fingerprint)

    def write(self, file: Path) -> None:
        edits = [json_format.MessageToDict(edit) for edit in self.edits]
        values = {"description": self.description, "model": self.model, "edits": edits}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", "utf-8")

    def edits_for(self, subject: LabModel) -> list[Edit]:
        """The edits, resolved for a model. Raises ValueError if they are another's, InvalidRequest if bad."""
        self.check(subject.manifest.fingerprint)
        return read_edits(self.edits, subject.tokenizer, subject.config.num_senses)

    def check(self, fingerprint: str) -> None:
        """Raises ValueError if the file was made for another model."""
        if self.model and self.model != fingerprint:
            raise ValueError(
                f"the patch was made for model {self.model[:12]}…, this is {fingerprint[:12]}…; make it again "
                "with `backpack lab … --model` of the model that is served"
            )
