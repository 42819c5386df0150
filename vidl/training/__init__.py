"""Training: one loop for all models, on one process or many; it resumes exactly."""

from vidl.training.config import Config
from vidl.training.loop import pretrain

__all__ = ["Config", "pretrain"]
