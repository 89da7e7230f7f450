"""Training: the loop, optimizers, evaluation with true tokens, checkpoints and metrics."""

from nextn.data.prepare import PreparedData, prepare_data, prepare_held_out
from nextn.mtp.fresh import check_recipe, fit_vocabulary, new_model
from nextn.training.checkpoint import check_run_folder, read_recipe, remove_run
from nextn.training.evaluation import TeacherForcedEvaluation, evaluate_teacher_forced, loss_by_position
from nextn.training.hardware import Precision, resolve_precision
from nextn.training.metrics import read_metrics
from nextn.training.optimizer import TrainingOptimizer, learning_rate_factor
from nextn.training.timing import time_steps, with_depths_on
from nextn.training.trainer import Trainer, TrainingResult

__all__ = [
    "Precision",
    "PreparedData",
    "TeacherForcedEvaluation",
    "Trainer",
    "TrainingOptimizer",
    "TrainingResult",
    "check_recipe",
    "check_run_folder",
    "evaluate_teacher_forced",
    "fit_vocabulary",
    "learning_rate_factor",
    "loss_by_position",
    "new_model",
    "prepare_data",
    "prepare_held_out",
    "read_metrics",
    "read_recipe",
    "remove_run",
    "resolve_precision",
    "time_steps",
    "with_depths_on",
]
