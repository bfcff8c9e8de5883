"""Training and fine-tuning: ``train`` runs what a ``Settings`` says; ``gptkern train`` is its command."""

from gptkern.train.errors import SettingsError
from gptkern.train.lora import add_lora, merge_lora
from gptkern.train.objective import Classification
from gptkern.train.optimizers import Lion, make_optimizers
from gptkern.train.settings import Settings
from gptkern.train.trainer import DivergedError, Result, Trainer, train

__all__ = [
    "Classification",
    "DivergedError",
    "Lion",
    "Result",
    "Settings",
    "SettingsError",
    "Trainer",
    "add_lora",
    "make_optimizers",
    "merge_lora",
    "train",
]
