"""The training loop: the same recipe gives the same run, whatever the micro-batches, and however often it is killed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor, nn

from nextn.alignment import align_depths
from nextn.config import Recipe
from nextn.data import PackedTokens, RowSampler, token_importance, validation_rows
from nextn.distributed import OneProcess, World
from nextn.errors import CheckpointError, ConfigError, DivergenceError
from nextn.files import list_checkpoints, make_folder, write_json
from nextn.model.balancing import update_routing_biases
from nextn.model.device import require_compiler, resolve_device
from nextn.mtp import MTPModel
from nextn.mtp.fresh import check_recipe
from nextn.objective import BatchTotals, Progress, StepObjective, label_counts
from nextn.tables import to_table
from nextn.training.checkpoint import (
    RunState,
    TrainingClock,
    check_run_folder,
    remove_old_checkpoints,
    restore,
    save_checkpoint,
    save_frozen_trunk,
    tokens_sha256,
)
from nextn.training.evaluation import evaluate_teacher_forced
from nextn.training.hardware import resolve_precision
from nextn.training.metrics import MetricsWriter, read_metrics, require_tensorboard
from nextn.training.optimizer import TrainingOptimizer
from nextn.training.progress import TrainingProgress
from nextn.training.step_report import StepReport


@dataclass(frozen=True)
class TrainingResult:
    """What a run came to.

    Attributes:
        checkpoint: folder of the last checkpoint, which is the trained model.
        metrics: path of metrics.jsonl.
        num_steps: optimizer steps done.
        num_tokens: tokens read by them.
        evaluation: the last evaluation line of metrics.jsonl; the injected table, if any, under "decoding".
    """

    checkpoint: Path
    metrics: Path
    num_steps: int
    num_tokens: int
    evaluation: dict[str, Any]


class Trainer:
    """Trains one model by one recipe into one folder.

    The folder holds recipe.json (all settings), provenance.json, metrics.jsonl and checkpoints/; the last checkpoint is
    the result. `train` seeds the global random generators and leaves the model in evaluation mode.

    Args:
        recipe: resolved settings.
        model: initialised (or loaded) model; moved to the recipe's device.
        train_tokens: what to train on.
        validation_tokens: what to evaluate on.
        run_folder: made if absent.
        evaluate: called with the model (in eval mode, outside autocast) at each evaluation; its table goes into
            metrics.jsonl as "decoding". None: only the teacher-forced part is evaluated.
        provenance: goes into provenance.json as it is.
        console: where progress goes; None: standard error.
        world: the processes of the run; None: this one alone, on the recipe's device.

    Raises:
        ConfigError: settings that contradict the scheme or the trunk, or nothing that is trained.
        DeviceError: the device or precision asked for is not here, or compiling was asked for and no compiler is.
        DataError: the corpus is shorter than a row.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: MTPModel,
        train_tokens: PackedTokens,
        validation_tokens: PackedTokens,
        run_folder: Path,
        *,
        evaluate: Callable[[MTPModel], dict[str, Any]] | None,
        provenance: dict[str, Any],
        console: Console | None = None,
        world: World | None = None,
    ) -> None:
        training, data = recipe.training, recipe.data
        check_recipe(recipe)
        self.recipe, self.run_folder = recipe, Path(run_folder)
        self.evaluate, self.provenance, self.console = evaluate, provenance, console
        self.world = world or OneProcess(resolve_device(training.device))
        self.device = self.world.device
        self.precision = resolve_precision(training.precision, self.device)
        self.model = model.to(self.device)
        _check_trainable(self.model, isolate_documents=data.isolate_documents)
        if training.tensorboard:
            require_tensorboard()
        if training.compile:
            require_compiler(self.device, "training.compile = true", "set training.compile = false")
            self.model.compile_layers()
        if training.recompute:
            self.model.recompute_layers()
        self._report: StepReport | None = None  # of the last step
        self._importance = token_importance(recipe.objective, model.tokenizer, train_tokens)
        sampler = RowSampler(train_tokens, data.sequence_length, training.batch_size, training.seed)
        optimizer = TrainingOptimizer(self.model, recipe.optimizer, training.num_steps)
        self.state = RunState(self.model, optimizer, sampler, TrainingClock())
        self._train_tokens_sha256 = tokens_sha256(train_tokens)
        self._validation = validation_rows(validation_tokens, data.sequence_length, recipe.evaluation.num_rows)
        self._bytes_per_token = validation_tokens.bytes_per_token

    def train(self, resume: bool = False) -> TrainingResult:
        """Train to the recipe's last step.

        Args:
            resume: go on from the folder's newest checkpoint (or from the start, if the run was killed before its
                first); False starts a new run in a folder that holds none.

        Raises:
            ConfigError: not resuming and the folder holds a run, or resuming with other settings.
            CheckpointError: resuming and the folder holds no run, or its newest checkpoint is damaged.
            DataError: resuming with other training tokens.
            DivergenceError: the loss or a gradient became NaN or infinite; the last checkpoint is untouched.
        """
        self._set_training()
        self.state.random.seed(self.recipe.training.seed)
        check_run_folder(self.run_folder, self.recipe, resume=resume)
        self._resume() if resume else self._begin()
        clock, num_steps = self.state.clock, self.recipe.training.num_steps
        resumed_at = clock.step
        metrics = MetricsWriter(self.run_folder, clock.step, self.recipe.training.tensorboard)
        progress = TrainingProgress(num_steps, resumed_at, self.console)
        try:
            with progress:
                how = f"{self.device}, {self.precision.name} ({self.precision.reason})"
                then = f"{'resuming' if resume else 'starting'} on {how}"
                then = then if resumed_at < num_steps else "nothing is left to train"
                progress.say(f"{resumed_at} of {num_steps} steps done, {then}")
                self._loop(metrics, progress)
        finally:
            metrics.close()
            self.model.eval()
        return TrainingResult(
            checkpoint=list_checkpoints(self.run_folder)[-1],
            metrics=metrics.path,
            num_steps=clock.step,
            num_tokens=clock.num_tokens,
            evaluation=_last_evaluation(metrics.path),
        )

    def _begin(self) -> None:
        make_folder(self.run_folder)
        write_json(self.run_folder / "provenance.json", self.provenance)
        write_json(self.run_folder / "recipe.json", to_table(self.recipe))
        save_frozen_trunk(self.run_folder, self.state)

    def _resume(self) -> None:
        checkpoints = list_checkpoints(self.run_folder)
        if checkpoints:
            restore(checkpoints[-1], self.state, self._train_tokens_sha256)
        else:
            save_frozen_trunk(self.run_folder, self.state)

    def _set_training(self) -> None:
        """The model in training mode; a frozen trunk computes as it will when it decodes."""
        self.model.train()
        if not any(parameter.requires_grad for parameter in cast(nn.Module, self.model.trunk).parameters()):
            cast(nn.Module, self.model.trunk).eval()

    def _loop(self, metrics: MetricsWriter, progress: TrainingProgress) -> None:
        training, clock = self.recipe.training, self.state.clock
        started = time.perf_counter() - clock.elapsed_s
        logged_tokens, logged_s = clock.num_tokens, clock.training_s
        while clock.step < training.num_steps:
            step_started = time.perf_counter()
            report = self.step()
            clock.training_s += time.perf_counter() - step_started
            clock.elapsed_s = time.perf_counter() - started
            tok_per_s = (clock.num_tokens - logged_tokens) / (clock.training_s - logged_s)
            progress.update(clock.step, report, tok_per_s)
            if self._is_due(training.log_every) or clock.step == 1:
                logged_tokens, logged_s = clock.num_tokens, clock.training_s
                metrics.write(self._record("train") | report.to_table() | {"tok_per_s": tok_per_s})
            if self._is_due(training.evaluate_every):
                metrics.write(self._evaluate())
            clock.elapsed_s = time.perf_counter() - started
            if self._is_due(training.checkpoint_every):
                self._save()

    def _is_due(self, every: int) -> bool:
        """True at multiples of `every` (0: at none) and after the last step."""
        step = self.state.clock.step
        return step == self.recipe.training.num_steps or (every > 0 and step % every == 0)

    def _record(self, kind: str) -> dict[str, Any]:
        clock = self.state.clock
        return {
            "kind": kind,
            "step": clock.step,
            "num_tokens": clock.num_tokens,
            "training_s": clock.training_s,
            "elapsed_s": clock.elapsed_s,
        }

    def step(self) -> StepReport:
        """One optimizer step on one global batch."""
        recipe, clock, optimizer = self.recipe, self.state.clock, self.state.optimizer
        num_depths = recipe.mtp.num_depths
        batch = self.state.sampler.next_batch()
        own = self.world.rows(len(batch.input_ids))
        input_ids = batch.input_ids[own].to(self.device)
        document_ids = batch.document_ids[own].to(self.device) if recipe.data.isolate_documents else None
        label_weights = None if self._importance is None else self._importance(batch.input_ids[own]).to(self.device)
        progress = Progress(clock.step, clock.num_tokens, recipe.training.num_steps)
        objective = StepObjective.of(recipe.objective, num_depths, progress)
        # Totals of the whole batch: each micro-batch adds its share of one sum, so its size does not matter.
        alignment = align_depths(input_ids, num_depths, document_ids=document_ids)
        counts = self.world.sum(label_counts(alignment, label_weights))
        totals = BatchTotals.of_counts(objective.denominator, counts, len(batch.input_ids))
        num_rows = recipe.training.micro_batch_size or recipe.training.batch_size
        optimizer.zero_grad()
        loss, balance_loss = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        loss_per_depth = torch.zeros(num_depths + 1, device=self.device)
        loads: dict[str, Tensor] = {}
        for first in range(0, input_ids.shape[0], num_rows):
            rows = slice(first, first + num_rows)
            with self.precision.autocast(self.device):
                output = self.model(
                    input_ids[rows],
                    document_ids=None if document_ids is None else document_ids[rows],
                    label_weights=None if label_weights is None else label_weights[rows],
                    objective=objective,
                    totals=totals,
                    alignment=[one.rows(rows) for one in alignment],
                )
            output.loss.backward()
            loss += output.loss.detach()
            loss_per_depth += output.loss_per_depth
            balance_loss += output.balance_loss
            for layer, load in output.expert_loads.items():
                loads[layer] = loads.get(layer, 0) + load
        self.world.sum_gradients(optimizer.parameters.values())
        loss, loss_per_depth, balance_loss = map(self.world.sum, (loss, loss_per_depth, balance_loss))
        loads = {layer: self.world.sum(load) for layer, load in loads.items()}
        grad_norm = self.world.global_norm(optimizer.gradients())
        self._check_finite(loss, loss_per_depth, grad_norm, objective.depth_weights)
        learning_rate = optimizer.step(clock.step, grad_norm)
        is_balanced = {"trunk": self.state.trains_trunk, "scheme": recipe.training.balance_mtp_blocks}
        balanced = {name: load for name, load in loads.items() if is_balanced[name.partition(".")[0]]}
        update_routing_biases(self.model, balanced, recipe.training.bias_update_speed)
        clock.step += 1
        clock.num_tokens += batch.input_ids.numel()
        sums = torch.stack((loss, balance_loss, grad_norm.to(loss.dtype)))
        self._report = StepReport(sums, loss_per_depth, list(objective.depth_weights), learning_rate, loads)
        return self._report

    def _check_finite(
        self, loss: Tensor, loss_per_depth: Tensor, grad_norm: Tensor, weights: tuple[float, ...]
    ) -> None:
        if bool(loss.isfinite() & grad_norm.isfinite()):  # the one value that every step waits for
            return
        counted = zip(loss_per_depth.tolist(), (1.0, *weights), strict=True)
        bad = [(depth, value) for depth, (value, weight) in enumerate(counted) if weight and not math.isfinite(value)]
        if bad:
            what = " and ".join(f"the loss of depth {depth} is {value}" for depth, value in bad)
        else:
            names = self.state.optimizer.non_finite_gradients()
            what = f"the losses are finite but the gradient norm is {grad_norm.item()}"
            what += f" (non-finite gradients: {', '.join(names[:3]) or 'none; the norm overflows'})"
        raise self._diverged(f"at step {self.state.clock.step + 1}: {what}. The weights were not updated")

    def _diverged(self, what: str) -> DivergenceError:
        """The error for a run that went wrong, with the way out. Checkpoints hold finite weights only, see `_save`."""
        checkpoints = list_checkpoints(self.run_folder)
        last = f"the last checkpoint is {checkpoints[-1]}" if checkpoints else "there is no checkpoint yet"
        return DivergenceError(
            f"training diverged {what}; {last}. Lower the learning rate, lengthen the warm-up, or lower "
            "optimizer.max_grad_norm, in a new run folder."
        )

    def _evaluate(self) -> dict[str, Any]:
        with self.precision.autocast(self.device):
            teacher_forced = evaluate_teacher_forced(
                self.model,
                self._validation,
                self._bytes_per_token,
                rows_per_forward=self.recipe.training.micro_batch_size or self.recipe.training.batch_size,
                isolate_documents=self.recipe.data.isolate_documents,
            )
        if not all(math.isfinite(loss) for loss in teacher_forced.loss_per_depth):
            raise self._diverged(
                f"by step {self.state.clock.step}: held-out losses are {teacher_forced.loss_per_depth}"
            )
        record = self._record("evaluation") | teacher_forced.to_table()
        loads = {} if self._report is None else self._report.expert_loads
        record["expert_load"] = {layer: (load / load.sum()).tolist() for layer, load in loads.items() if load.any()}
        if self.evaluate is not None:
            self.model.eval()
            record["decoding"] = self.evaluate(self.model)
            self._set_training()
        return record

    def _save(self) -> None:
        for name, parameter in self.model.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise self._diverged(f"in the update of step {self.state.clock.step}: {name} is not finite")
        save_checkpoint(
            self.run_folder,
            self.state,
            train_tokens_sha256=self._train_tokens_sha256,
            recipe=to_table(self.recipe),
            provenance=self.provenance,
        )
        remove_old_checkpoints(self.run_folder, self.recipe.training.num_kept_checkpoints)


def _check_trainable(model: MTPModel, isolate_documents: bool) -> None:
    """Raise ConfigError where no weight is trained, or where the trunk cannot keep packed documents apart."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("no weight of this model is trained; set trunk.train = 'all', or mtp.num_depths above 0")
    if isolate_documents:
        try:
            model.trunk.context(2, torch.tensor([[0, 1]], device=model.trunk.device))
        except ConfigError as error:
            raise ConfigError(f"{error}, or set data.isolate_documents = false") from None


def _last_evaluation(path: Path) -> dict[str, Any]:
    evaluations = [record for record in read_metrics(path) if record["kind"] == "evaluation"]
    if not evaluations:
        raise CheckpointError(f"{path} has lost its lines of evaluation; evaluate the checkpoint with nextn evaluate")
    return evaluations[-1]
