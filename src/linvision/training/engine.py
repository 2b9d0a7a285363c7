"""A training run from its plan to a folder with weights, metrics, pictures and a summary."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins.environments import LightningEnvironment
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.loggers import TensorBoardLogger

from linvision.console import duration, notes, output
from linvision.data import worker_failures
from linvision.errors import RunError, WorkerError
from linvision.interruption import Interruption
from linvision.training.callbacks import EpochSeed, Obedience, Recorder, read_metrics
from linvision.training.checkpoints import AtomicCheckpointIO
from linvision.training.module import TrainingModule
from linvision.training.opened import count_parameters
from linvision.training.plan import Plan
from linvision.training.progress import Reporter
from linvision.training.results import Outcome, finish
from linvision.training.run_folder import RunFolder

LIGHTNING_PRECISION: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


def run_training(plan: Plan, run: RunFolder, interruption: Interruption) -> Outcome:
    """Train, from where the run's folder stands, and leave the results there."""
    interruption.advice = f"stopped; continue with: linvision train --resume {run.path}"
    task, outputs = plan.task, plan.outputs
    run.save_card(plan.card())
    notes().print(_headline(plan, run), markup=False)
    module = task.module(plan.model, plan.settings, outputs=outputs, batches=plan.train)
    recorder = Recorder(run, task)
    try:
        with worker_failures():
            with interruption.patience(), _without_notices():
                fit(module, plan, run, recorder, interruption)
            outcome = finish(module, plan, run, recorder)
    except (OSError, WorkerError):  # of the machine, so that the run can go on elsewhere or later
        notes().print(f"when that is mended, continue with: linvision train --resume {run.path}", markup=False)
        raise
    _tell(plan, run, recorder, outcome)
    return outcome


def fit(module: TrainingModule, plan: Plan, run: RunFolder, recorder: Recorder, interruption: Interruption) -> None:
    """Train, from where the run's folder stands."""
    resumed = str(run.state) if run.has_state() else None
    steps = len(plan.train)
    logger = TensorBoardLogger(
        run.path,
        name="tensorboard",
        version="",
        default_hp_metric=False,
        purge_step=len(read_metrics(run.metrics)) * steps if resumed else None,
    )
    trainer = pl.Trainer(
        accelerator="gpu" if plan.device.type == "cuda" else "cpu",
        devices=1,
        precision=LIGHTNING_PRECISION[plan.options.precision],
        max_epochs=plan.settings.epochs,
        gradient_clip_val=plan.settings.clip_grad or None,
        callbacks=[
            Obedience(interruption),
            EpochSeed(plan.train, plan.options.seed),
            LearningRateMonitor("step"),
            recorder,
            Reporter(recorder, plan.task, plan.settings.epochs),
        ],
        plugins=[AtomicCheckpointIO(), LightningEnvironment()],  # one process, also inside of a SLURM job of several
        logger=logger,
        log_every_n_steps=max(1, min(50, steps // 10)),
        num_sanity_val_steps=0,
        default_root_dir=run.path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    try:
        trainer.fit(module, plan.train, plan.val, ckpt_path=resumed, weights_only=True)
    except (AttributeError, LookupError, MisconfigurationException, RuntimeError, TypeError, ValueError) as error:
        if resumed is None or recorder.began or isinstance(error, RunError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"{run.state} is no state of this run: {reason}") from error


@contextmanager
def _without_notices() -> Iterator[None]:
    """Keep Lightning's notices to itself."""
    levels = {name: logging.getLogger(name).level for name in ("pytorch_lightning", "lightning_fabric")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _headline(plan: Plan, run: RunFolder) -> str:
    return (
        f"{plan.settings.model}, {count_parameters(plan.model) / 1e6:.2f} M parameters, "
        f"from {plan.start or 'scratch'}, on {plan.data.name}: "
        f"{plan.train.num_images} training and {plan.val.num_images} validation images, "
        f"{plan.settings.epochs} epochs on {plan.device}; {run.path}"
    )


def _tell(plan: Plan, run: RunFolder, recorder: Recorder, outcome: Outcome) -> None:
    seconds = sum(row["seconds"] for row in recorder.rows)
    output().print(
        f"{outcome.split} {plan.task.result_line(outcome.measured)} with the weights of epoch {outcome.epoch}, "
        f"the best of {len(recorder.rows)}, in {duration(seconds)}; results in {run.path}",
        markup=False,
    )
    if outcome.measured.warning():
        notes().print(outcome.measured.warning(), markup=False)
    unreadable = plan.unreadable()
    if unreadable:
        notes().print(f"{len(unreadable)} images could not be read and were skipped:", markup=False)
        for reason in unreadable.values():
            notes().print(f"  {reason}", markup=False)
