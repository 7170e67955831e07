"""The lab's tiny model, for experiments too."""

from tests.models.lab.conftest import folder, subject

__all__ = ["folder", "subject"]
