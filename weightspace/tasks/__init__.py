"""What metanetworks are trained for, how they are trained, and how they are scored."""

from weightspace.tasks._classification import Classification
from weightspace.tasks._config import TrainConfig, load_config, train_config
from weightspace.tasks._evaluate import EvaluateReport, evaluate
from weightspace.tasks._registry import TASKS, Task
from weightspace.tasks._run import Metanetwork, TrainedRun, load_run
from weightspace.tasks._train import TrainReport, train

__all__ = [
    "TASKS",
    "Classification",
    "EvaluateReport",
    "Metanetwork",
    "Task",
    "TrainConfig",
    "TrainReport",
    "TrainedRun",
    "evaluate",
    "load_config",
    "load_run",
    "train",
    "train_config",
]
