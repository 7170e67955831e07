"""Writes lightning.ckpt as the paper's training code does: by Lightning itself, its hyper-parameters an omegaconf
DictConfig, its module named as by torch.compile. Neither package is among ours, so the file is kept. To make it:

    pip install --target SITE --no-deps pytorch-lightning lightning-utilities torchmetrics omegaconf \\
        antlr4-python3-runtime==4.9.3 PyYAML fsspec tqdm packaging
    PYTHONPATH=SITE python -m tests.models.lightning_file
"""

from __future__ import annotations

from pathlib import Path

import torch
from backpack_lm.config import BackpackConfig
from backpack_lm.model import Backpack

FILE = Path(__file__).parent / "lightning.ckpt"
CONFIG = BackpackConfig.gpt2(vocab_size=9, n_positions=4, n_embd=4, n_layer=2, n_head=2, num_senses=2)


def state() -> dict[str, torch.Tensor]:
    """Numbers that need no seed, under Hugging Face's names with their prefix."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Backpack(CONFIG).state_dict().items()}
    out = {}
    for at, (name, shape) in enumerate(sorted(shapes.items())):
        norm = 1.0 if ".ln" in name and name.endswith("weight") else 0.0
        out["backpack." + name] = norm + (torch.arange(float(shape.numel())) * 0.7 + at).sin().view(shape)
    return out


def main() -> None:
    import pytorch_lightning as lightning
    from omegaconf import OmegaConf
    from torch import nn

    from tests.models.test_checkpoint import lightning_names

    class Training(lightning.LightningModule):
        def __init__(self, cfg: object) -> None:
            super().__init__()
            self.save_hyperparameters(cfg)
            for name, tensor in lightning_names(state(), CONFIG.trunk.depth).items():
                owner: nn.Module = self
                *path, last = ("model._orig_mod." + name.removeprefix("model.")).split(".")
                for part in path:
                    if not hasattr(owner, part):
                        owner.add_module(part, nn.Module())
                    owner = getattr(owner, part)
                owner.register_parameter(last, nn.Parameter(tensor.contiguous()))

        def training_step(self, batch: object, _: int) -> torch.Tensor:
            return sum((p.sum() for p in self.parameters()), torch.zeros(())) * 0.0

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    cfg = OmegaConf.create(
        {
            "model": {"config": {"_target_": "transformers.GPT2Config", "n_head": 2, "n_embd": 4}},
            "seed": "${oc.env:X,1}",
        }
    )
    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(Training(cfg), torch.utils.data.DataLoader([torch.zeros(1)]))
    trainer.save_checkpoint(FILE)


if __name__ == "__main__":
    main()
