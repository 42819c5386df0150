"""Training: one loop for all models, on one or several processes, with exact resumption."""

from vidl.training.config import Config
from vidl.training.finetune import configuration, finetune
from vidl.training.loop import Diverged, pretrain
from vidl.training.runs import Trained, open_run

__all__ = ["Config", "Diverged", "Trained", "configuration", "finetune", "open_run", "pretrain"]
