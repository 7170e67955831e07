"""Everything that decides what a run of `backpack adapt` computes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from backpack_lm import strict_json
from backpack_lm.config import BackpackConfig
from backpack_lm.kernels import Precision
from backpack_lm.trunks import TrunkSpec

_LAYERS = ("query_layers", "key_layers", "word_layers")


@dataclass(frozen=True, slots=True)
class AdaptRecipe:
    """The shape of the sense path, and how it is trained.

    The Transformer reads `fresh` rows of text once; a run takes `steps` of `rows_per_step` of them, again and again in
    another order. In the last `tuned_share` of the steps the uppermost `tuned_layers` of the trunk are trained, too.
    `query_layers` and `key_layers` are those of `BackpackConfig`, by default the last layer and quarters of the trunk;
    `word_layers` are those whose states of a lone word the senses are made from, by default quarters of it.

    Learning rates warm up linearly, stay, and fall linearly to zero over the last `decay` of the steps. `matrix_lr` is
    Muon's, for the matrices of the sense path; `lr` AdamW's for the rest of it, and `tuned_lr` for the trunk.
    """

    steps: int
    fresh: int
    senses: int = 16
    sense_head: int = 64
    sense_theta: float = 10_000.0
    query_layers: tuple[int, ...] = ()
    key_layers: tuple[int, ...] = ()
    word_layers: tuple[int, ...] = ()
    inner: int = 2304
    row: int = 512
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
        for name in ("steps", "fresh", "senses", "row", "rows_per_step", "start_rows", "inner"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise ValueError(f"the recipe's {name} is {value!r}; it must be an integer from 1 on")
        for name in ("decay", "warmup", "tuned_share"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"the recipe's {name} is {value!r}; it is a share of the steps, from 0 to 1")

    @classmethod
    def read(cls, path: Path, **more: Any) -> AdaptRecipe:
        """A recipe file's, where `more` doesn't say otherwise. Raises ValueError naming what it can't have."""
        return cls.of({**strict_json.read(path, finite=True), **more}, str(path))

    @classmethod
    def of(cls, values: dict[str, Any], where: str = "the recipe") -> AdaptRecipe:
        known = {f.name for f in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise ValueError(f"{where} has {', '.join(unknown)}; a recipe has {', '.join(sorted(known))}")
        if missing := sorted({"steps", "fresh"} - values.keys()):
            raise ValueError(f"{where} has no {', '.join(missing)}; give them, or --budget")
        read: dict[str, Any] = {name: tuple(value) if name in _LAYERS else value for name, value in values.items()}
        return cls(**{**read, "precision": Precision(read.get("precision", Precision.BFLOAT16))})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def scale(self, step: int) -> float:
        """What the learning rates are multiplied by at a step."""
        up = (step + 1) / max(1.0, self.warmup * self.steps)
        down = (self.steps - step) / max(1.0, self.decay * self.steps)
        return min(1.0, up, down)

    @property
    def tuned_from(self) -> int:
        """The first step that trains layers of the trunk; `steps` if none does."""
        return self.steps - round(self.tuned_share * self.steps) if self.tuned_layers else self.steps

    def tuned_scale(self, step: int) -> float:
        """The same for the trunk's rate, which warms up when its layers are first trained."""
        up = (step - self.tuned_from + 1) / max(1.0, self.warmup * self.steps)
        return min(self.scale(step), up) if step >= self.tuned_from else 0.0

    def words_of(self, depth: int) -> tuple[int, ...]:
        """The layers whose states of lone words are read, of a trunk so deep; the last one among them."""
        return self.word_layers or tuple(sorted({round(depth * part / 4) for part in range(5)}))

    def config(self, trunk: TrunkSpec, end_of_text: int, num_tokens: int) -> BackpackConfig:
        """The shape of the Backpack that is made. Raises ConfigError."""
        depth = trunk.depth
        quarters = sorted({round(depth * part / 4) for part in (1, 2, 3)})
        config = BackpackConfig(
            trunk,
            num_senses=self.senses,
            eos_token_id=end_of_text,
            sense_head=self.sense_head,
            sense_theta=self.sense_theta,
            query_layers=self.query_layers or tuple(sorted({round(depth * 0.8), depth})),
            key_layers=self.key_layers or tuple(quarters),
        )
        return config.with_tokens(num_tokens)
