"""Training: the loop, optimizers, evaluation with true tokens, checkpoints and metrics."""

from nextn.training.evaluation import TeacherForcedEvaluation, evaluate_teacher_forced
from nextn.training.hardware import Precision, resolve_precision
from nextn.training.metrics import read_metrics
from nextn.training.optimizer import TrainingOptimizer, learning_rate_factor
from nextn.training.prepare import PreparedData, fit_vocabulary, new_model, prepare_data
from nextn.training.state import read_recipe
from nextn.training.timing import time_steps
from nextn.training.trainer import Trainer, TrainingResult

__all__ = [
    "Precision",
    "PreparedData",
    "TeacherForcedEvaluation",
    "Trainer",
    "TrainingOptimizer",
    "TrainingResult",
    "evaluate_teacher_forced",
    "fit_vocabulary",
    "learning_rate_factor",
    "new_model",
    "prepare_data",
    "read_metrics",
    "read_recipe",
    "resolve_precision",
    "time_steps",
]
