"""The command ``linvision train``: from options to a run folder with weights, metrics, pictures and a summary."""

import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger

from linvision.console import duration, notes, output
from linvision.errors import UsageError
from linvision.tasks.callbacks import (
    AtomicCheckpointIO,
    EpochSeed,
    Interruption,
    Recorder,
    Reporter,
    read_metrics,
)
from linvision.tasks.classify import Classifier
from linvision.tasks.evaluate import Measured
from linvision.tasks.loading import count_parameters
from linvision.tasks.options import TrainOptions
from linvision.tasks.plan import Plan, prepare
from linvision.tasks.results import finish
from linvision.tasks.run_folder import ModelCard, RunFolder, check_out, create_run_folder

# What may differ when a run is continued: where and how it runs, not what it computes.
MACHINE = ("device", "checkpointing", "workers", "data_root")
LIGHTNING_PRECISION: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


def train(options: TrainOptions) -> int:
    """Run ``linvision train``."""
    run = None
    if options.resume is not None:
        run = RunFolder(Path(options.resume))
        options = resumed_options(options, run)
        run.tidy()
    else:
        check_out(options)
    plan = prepare(options, fresh=run is None or not run.state.is_file())
    if run is None:
        run = create_run_folder(plan.options)
        run.save_options(plan.options)
    card = ModelCard(plan.recipe.model, plan.data.classes, plan.preprocess, plan.options.data)
    run.save_card(card)
    notes().print(_headline(plan, run), markup=False)
    classifier = Classifier(
        plan.model, plan.recipe, num_classes=len(plan.data.classes), steps_per_epoch=len(plan.train)
    )
    recorder = Recorder(run)
    with _resumable(run) as interruption:
        fit(classifier, plan, run, recorder, interruption)
    measured = finish(classifier, plan, run, recorder)
    _tell(plan, run, recorder, measured)
    return 0


def fit(classifier: Classifier, plan: Plan, run: RunFolder, recorder: Recorder, interruption: Interruption) -> None:
    """Train, from where the run's folder stands."""
    resumed = str(run.state) if run.state.is_file() else None
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
        max_epochs=plan.recipe.epochs,
        gradient_clip_val=plan.recipe.clip_grad or None,
        callbacks=[
            interruption,
            EpochSeed(plan.train, plan.options.seed),
            recorder,
            Reporter(recorder, plan.recipe.epochs),
        ],
        plugins=[AtomicCheckpointIO()],
        logger=logger,
        log_every_n_steps=min(50, steps),
        num_sanity_val_steps=0,
        default_root_dir=run.path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(classifier, plan.train, plan.test, ckpt_path=resumed, weights_only=True)


def resumed_options(options: TrainOptions, run: RunFolder) -> TrainOptions:
    """Return the run's own options, but for what concerns the machine."""
    unwanted = [name for name in options.given() if name not in ("resume", *MACHINE)]
    if unwanted:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in unwanted)
        raise UsageError(f"--resume continues a run as it was configured: leave out {names}, or start a new run")
    stored = run.load_options()
    return replace(stored, **{name: getattr(options, name) for name in options.given() if name in MACHINE})


@contextmanager
def _resumable(run: RunFolder) -> Iterator[Interruption]:
    """Let SIGTERM and Ctrl-C end a run in order, and say how to go on; keep Lightning's notices to itself."""
    interruption = Interruption()
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.signal(number, interruption.note) for number in (signal.SIGINT, signal.SIGTERM)}
    levels = {name: logging.getLogger(name).level for name in ("pytorch_lightning", "lightning_fabric")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")
            yield interruption
        interruption.obey()
    except SystemExit:
        notes().print(f"stopped; continue with: linvision train --resume {run.path}", markup=False)
        interruption.obey()  # Lightning's own exit after SIGTERM has another code
        raise
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _headline(plan: Plan, run: RunFolder) -> str:
    return (
        f"{plan.recipe.model}, {count_parameters(plan.model) / 1e6:.2f} M parameters, on {plan.data.name}: "
        f"{plan.train.num_images} training and {plan.test.num_images} test images, "
        f"{plan.recipe.epochs} epochs on {plan.device}; {run.path}"
    )


def _tell(plan: Plan, run: RunFolder, recorder: Recorder, measured: Measured) -> None:
    seconds = sum(row["seconds"] for row in recorder.rows)
    best = recorder.best
    output().print(
        f"test accuracy {measured.top1:.2%} after {len(recorder.rows)} epochs in {duration(seconds)} "
        f"(best {best['test_top1']:.2%}, epoch {best['epoch']:.0f}); results in {run.path}",
        markup=False,
    )
    unreadable = plan.unreadable()
    if unreadable:
        notes().print(f"{len(unreadable)} images could not be read and were skipped:", markup=False)
        for reason in unreadable.values():
            notes().print(f"  {reason}", markup=False)
