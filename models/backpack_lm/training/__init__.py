"""The recipe of the default model: data, loss, trainer, evaluation."""
