"""Everything that decides what a run of `backpack adapt` computes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from backpack_lm import strict_json
from backpack_lm.config import BackpackConfig
from backpack_lm.kernels import Precision
from backpack_lm.training.trainer import warm_up_and_decay
from backpack_lm.trunks import TrunkSpec

_LAYERS = ("query_layers", "key_layers", "word_layers")
_FROM_ZERO = ("tuned_layers", "seed")
_SHARES = ("tuned_share", "warmup", "decay")


@dataclass(frozen=True, slots=True)
class AdaptRecipe:
    """The shape of the sense path, and how it is trained.

    The teacher reads `distinct_rows` rows of `row_tokens` tokens once; a run takes `steps` of `rows_per_step` of them,
    again and again in another order. In the last `tuned_share` of the steps the uppermost `tuned_layers` of the trunk
    are trained, too. `start_rows` of the rows decide about the senses that training begins with.

    Layers are counted as in `BackpackConfig`. Where none are named, queries read the layers at 0.8 of the trunk's depth
    and the last, keys those at 4, 8 and 12 fifteenths of it, and senses are made from a lone word's states at its
    quarters; the last of these `word_layers` is always the trunk's output. `sense_inner` is the inner width of the MLP
    that makes senses.

    `matrix_lr` is Muon's learning rate, for the matrices of the sense path; `lr` AdamW's, for the rest of it, and
    `tuned_lr` for the trunk. All follow `warm_up_and_decay`.
    """

    steps: int
    distinct_rows: int
    senses: int = 16
    sense_head: int = 64
    sense_theta: float = 10_000.0
    sense_inner: int = 2304
    query_layers: tuple[int, ...] = ()
    key_layers: tuple[int, ...] = ()
    word_layers: tuple[int, ...] = ()
    row_tokens: int = 512
    rows_per_step: int = 8
    start_rows: int = 240
    cross_entropy: float = 0.3
    lr: float = 3e-4
    matrix_lr: float = 1e-3
    tuned_layers: int = 6
    tuned_share: float = 0.4
    tuned_lr: float = 1.5e-4
    weight_decay: float = 0.01
    warmup: float = 0.02
    decay: float = 0.5
    clip: float = 1.0
    seed: int = 0
    precision: Precision = Precision.BFLOAT16

    def __post_init__(self) -> None:
        for field in fields(self):
            value, name = getattr(self, field.name), field.name
            if name in _LAYERS:
                good = isinstance(value, tuple) and all(map(_is_integer, value))
                wanted = "a list of layers"
            elif name == "precision":
                good, wanted = value in (Precision.FLOAT32, Precision.BFLOAT16), "float32 or bfloat16"
            elif field.type == "int":
                least = 0 if name in _FROM_ZERO else 1
                good, wanted = _is_integer(value) and value >= least, f"an integer from {least} on"
            else:
                most = 1.0 if name in _SHARES else math.inf
                good = isinstance(value, float) and 0 <= value <= most and math.isfinite(value)
                wanted = "a number from 0 to 1" if name in _SHARES else "a number from 0 on"
            if not good:
                raise ValueError(f"the recipe's {name} is {value!r}; it must be {wanted}")

    @classmethod
    def read(cls, path: Path, **more: Any) -> AdaptRecipe:
        """A recipe file's, where `more` doesn't say otherwise. Raises ValueError naming what it can't have."""
        values = strict_json.read(path, finite=True)
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds no object; a recipe is one")
        return cls.of({**values, **more}, str(path))

    @classmethod
    def of(cls, values: dict[str, Any], where: str = "the recipe") -> AdaptRecipe:
        """From the values of a file. Raises ValueError as `read`."""
        known = {field.name: field.type for field in fields(cls)}
        if unknown := sorted(values.keys() - known.keys()):
            raise ValueError(f"{where} has {', '.join(unknown)}; a recipe has {', '.join(sorted(known))}")
        if missing := sorted({"steps", "distinct_rows"} - values.keys()):
            raise ValueError(f"{where} has no {', '.join(missing)}; give them, or --budget")
        read = dict(values)
        for name, value in values.items():
            if name in _LAYERS and isinstance(value, list):
                read[name] = tuple(value)
            elif known[name] == "float" and _is_integer(value):
                read[name] = float(value)
            elif name == "precision" and value in list(Precision):
                read[name] = Precision(value)
        return cls(**read)

    def to_json(self) -> dict[str, Any]:
        """What `of` takes."""
        return asdict(self)

    def scale(self, step: int) -> float:
        """What the sense path's learning rates are multiplied by at a step."""
        return warm_up_and_decay(step, self.steps, self.warmup, self.decay)

    @property
    def tuned_from(self) -> int:
        """The first step that trains layers of the trunk; `steps` if none does."""
        return self.steps - round(self.tuned_share * self.steps) if self.tuned_layers else self.steps

    def tuned_scale(self, step: int) -> float:
        """The same for the trunk's, which warms up when its layers are first trained."""
        up = (step - self.tuned_from + 1) / max(1.0, self.warmup * self.steps)
        return min(self.scale(step), up) if step >= self.tuned_from else 0.0

    def resolved_word_layers(self, depth: int) -> tuple[int, ...]:
        """`word_layers`, of a trunk so deep."""
        return self.word_layers or tuple(sorted({round(depth * part / 4) for part in range(5)}))

    def config(self, trunk: TrunkSpec, end_of_text: int, num_tokens: int) -> BackpackConfig:
        """The shape of the Backpack that is made. Raises ValueError if the recipe isn't for this trunk."""
        depth, word_layers = trunk.depth, self.resolved_word_layers(trunk.depth)
        if self.tuned_layers > depth:
            raise ValueError(f"the recipe's tuned_layers is {self.tuned_layers}; the trunk has {depth} layers")
        if self.row_tokens > trunk.context:
            raise ValueError(f"the recipe's row_tokens is {self.row_tokens}; the context holds {trunk.context}")
        if list(word_layers) != sorted(set(word_layers) & set(range(depth + 1))) or word_layers[-1] != depth:
            raise ValueError(f"the recipe's word_layers is {word_layers}; it must ascend, from 0 on, to {depth}")

        def at(*shares: float) -> tuple[int, ...]:
            return tuple(sorted({round(depth * share) for share in shares}))

        config = BackpackConfig(
            trunk,
            num_senses=self.senses,
            eos_token_id=end_of_text,
            sense_head=self.sense_head,
            sense_theta=self.sense_theta,
            query_layers=self.query_layers or at(0.8, 1),
            key_layers=self.key_layers or at(4 / 15, 8 / 15, 12 / 15),
        )
        return config.with_tokens(num_tokens)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
