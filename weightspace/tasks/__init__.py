"""What metanetworks are trained for, how they are trained, and how they are scored."""

from weightspace.tasks._classification import Classification, ClassificationOptions
from weightspace.tasks._config import TrainConfig, load_config, train_config
from weightspace.tasks._contrastive import Contrastive, ContrastiveOptions, EmbeddingMetanetwork, nt_xent
from weightspace.tasks._edit import EditReport, edit
from weightspace.tasks._editing import Editing, EditingOptions, Renderer, blur, contrast, dilate, erode
from weightspace.tasks._evaluate import EvaluateReport, evaluate
from weightspace.tasks._linear_probe import LinearProbe
from weightspace.tasks._metanetwork import Metanetwork, ResidualMetanetwork
from weightspace.tasks._predict import PredictReport, predict
from weightspace.tasks._registry import TASKS, Outputs, Task, TaskOptions, task_options
from weightspace.tasks._regression import Regression, RegressionOptions
from weightspace.tasks._run import TrainedRun, load_run
from weightspace.tasks._train import TrainReport, train

__all__ = [
    "TASKS",
    "Classification",
    "ClassificationOptions",
    "Contrastive",
    "ContrastiveOptions",
    "EditReport",
    "Editing",
    "EditingOptions",
    "EmbeddingMetanetwork",
    "EvaluateReport",
    "LinearProbe",
    "Metanetwork",
    "Outputs",
    "PredictReport",
    "Regression",
    "RegressionOptions",
    "Renderer",
    "ResidualMetanetwork",
    "Task",
    "TaskOptions",
    "TrainConfig",
    "TrainReport",
    "TrainedRun",
    "blur",
    "contrast",
    "dilate",
    "edit",
    "erode",
    "evaluate",
    "load_config",
    "load_run",
    "nt_xent",
    "predict",
    "task_options",
    "train",
    "train_config",
]
