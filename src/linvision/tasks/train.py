"""The command ``linvision train``: from options to a run folder with weights, metrics, pictures and a summary."""

import logging
import os
import platform
import signal
import statistics
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import timm
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn

import linvision
from linvision.data import ArrayData, Batches, FolderData, Preprocess, open_data
from linvision.errors import UsageError
from linvision.models import CheckpointError, create_model, resolve_name
from linvision.tasks.callbacks import AtomicCheckpointIO, EpochSeed, Recorder, Reporter, read_metrics
from linvision.tasks.classify import Classifier
from linvision.tasks.console import duration, notes, output
from linvision.tasks.evaluate import Measured, measure
from linvision.tasks.files import write_json
from linvision.tasks.loading import check_size, choose_device, count_parameters, size_overrides
from linvision.tasks.options import Recipe, TrainOptions
from linvision.tasks.pictures import choose_examples, draw_confusion, draw_curves, draw_predictions
from linvision.tasks.run_folder import ModelCard, RunFolder, check_out, create_run_folder

# What may differ when a run is continued: where it runs, not what it computes.
MACHINE = ("device", "workers", "data_root")
LIGHTNING_PRECISION: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


@dataclass(frozen=True)
class Plan:
    """All that a run needs before it has a folder."""

    options: TrainOptions
    recipe: Recipe
    device: torch.device
    data: ArrayData | FolderData
    preprocess: Preprocess
    model: nn.Module
    train: Batches
    test: Batches


def train(options: TrainOptions) -> int:
    """Run ``linvision train``."""
    run = None
    if options.resume is not None:
        run = RunFolder(Path(options.resume))
        options = _resumed_options(options, run)
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
    with _resumable(run):
        fit(classifier, plan, run, recorder)
    measured = finish(classifier, plan, run, recorder)
    _tell(plan, run, recorder, measured)
    return 0


def prepare(options: TrainOptions, *, fresh: bool = True) -> Plan:
    """Open the data and build the model, everything checked.

    Args:
        options: of the command.
        fresh: load the published weights or the checkpoint file that the options ask for; a resumed run has its own.

    Raises:
        ValueError, OSError, RunError: for whatever is wrong with the options, the data or the weights.
    """
    recipe = options.recipe()
    recipe = replace(recipe, model=resolve_name(recipe.model))
    device = choose_device(options.device, options.precision)
    data = open_data(options.data, root=options.data_root)
    pl.seed_everything(options.seed, verbose=False)
    overrides: dict[str, Any] = size_overrides(recipe.model, recipe.img_size)
    if recipe.drop_path:
        overrides["drop_path_rate"] = recipe.drop_path
    if fresh and options.checkpoint:
        overrides |= {"checkpoint_path": options.checkpoint, "drop_head": options.drop_head}
    try:
        model = create_model(
            recipe.model, pretrained=fresh and options.pretrained, num_classes=len(data.classes), **overrides
        )
    except CheckpointError as error:
        raise CheckpointError(str(error).replace("drop_head=True", "--drop-head")) from error
    preprocess = Preprocess.of_model(model, recipe.img_size)
    if isinstance(data, ArrayData):
        own = options.pretrained or options.checkpoint
        statistics = {} if own else {"mean": data.mean, "std": data.std}
        preprocess = replace(preprocess, crop_ratio=1.0, grey=data.grey, **statistics)
    check_size(model, preprocess)
    workers = options.workers if options.workers is not None else min(8, os.cpu_count() or 1)
    batches = {"batch_size": recipe.batch_size, "workers": workers}
    place = str(Path(options.data).expanduser().resolve()) if isinstance(data, FolderData) else options.data
    return Plan(
        options=replace(options, **{**asdict(recipe), "data": place}),
        recipe=recipe,
        device=device,
        data=data,
        preprocess=preprocess,
        model=model.train(),
        train=data.train_batches(preprocess, seed=options.seed, **batches),
        test=data.test_batches(preprocess, **batches),
    )


def fit(classifier: Classifier, plan: Plan, run: RunFolder, recorder: Recorder) -> None:
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
        callbacks=[EpochSeed(plan.train, plan.options.seed), recorder, Reporter(recorder, plan.recipe.epochs)],
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


def finish(classifier: Classifier, plan: Plan, run: RunFolder, recorder: Recorder) -> Measured:
    """Measure the last weights, draw the pictures and write the summary."""
    model = classifier.final_model.to(plan.device).eval()
    measured = measure(model, plan.test, device=plan.device, precision=plan.options.precision)
    classes = plan.data.classes
    title = f"{plan.recipe.model} on {plan.data.name}"
    draw_curves(run.path / "curves.png", recorder.rows, title)
    confusion = measured.confusion(len(classes))
    draw_confusion(run.path / "confusion_matrix.png", confusion, classes, f"{title}: {measured.top1:.2%}")
    chosen = choose_examples(measured.predictions, measured.labels)
    images = plan.preprocess.denormalise(_take(plan.test, chosen))
    wrong = int((measured.predictions != measured.labels).sum())
    draw_predictions(
        run.path / "predictions.png",
        images,
        measured.predictions[chosen],
        measured.labels[chosen],
        classes,
        f"{title}: {wrong} of {len(measured.labels)} test images wrong",
    )
    write_json(run.path / "summary.json", _summary(model, plan, recorder, measured))
    return measured


def _resumed_options(options: TrainOptions, run: RunFolder) -> TrainOptions:
    """Return the run's own options, but for what concerns the machine."""
    unwanted = [name for name in options.given() if name not in ("resume", *MACHINE)]
    if unwanted:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in unwanted)
        raise UsageError(f"--resume continues a run as it was configured: leave out {names}, or start a new run")
    stored = run.load_options()
    return replace(stored, **{name: getattr(options, name) for name in options.given() if name in MACHINE})


@contextmanager
def _resumable(run: RunFolder) -> Iterator[None]:
    """Let SIGTERM and Ctrl-C end a run in order, and say how to go on; keep Lightning's notices to itself."""
    main_thread = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    if main_thread:
        signal.signal(signal.SIGTERM, stop)
    levels = {name: logging.getLogger(name).level for name in ("pytorch_lightning", "lightning_fabric")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")
            yield
    except (SystemExit, KeyboardInterrupt) as error:
        notes().print(f"stopped; continue with: linvision train --resume {run.path}", markup=False)
        # Lightning turns Ctrl-C into an exit with code 1.
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if main_thread:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _take(batches: Batches, chosen: torch.Tensor) -> torch.Tensor:
    """Return the inputs at the given places, in ascending order, of a pass over ``batches``."""
    taken, start = [], 0
    for inputs, labels in batches:
        here = chosen[(chosen >= start) & (chosen < start + len(labels))] - start
        if len(here):
            taken.append(inputs[here])
        start += len(labels)
        if start > chosen[-1]:
            break
    return torch.cat(taken)


def _summary(model: nn.Module, plan: Plan, recorder: Recorder, measured: Measured) -> dict[str, Any]:
    best = recorder.best
    gpu = torch.cuda.get_device_name() if plan.device.type == "cuda" else ""
    return {
        "model": plan.recipe.model,
        "data": plan.options.data,
        "parameters": count_parameters(model),
        "top1": measured.top1,
        "top5": measured.top5,
        "loss": measured.loss,
        "best": {"top1": best["test_top1"], "epoch": int(best["epoch"])},
        "epochs": len(recorder.rows),
        "seconds": round(sum(row["seconds"] for row in recorder.rows), 1),
        "images_per_second": round(statistics.median(row["images_per_second"] for row in recorder.rows), 1),
        "test_images_per_second": round(measured.images_per_second, 1),
        "train_images": plan.train.num_images,
        "test_images": len(measured.labels),
        "unreadable": _unreadable(plan),
        "seed": plan.options.seed,
        "device": gpu or _cpu_name(),
        "precision": plan.options.precision,
        "threads": torch.get_num_threads(),
        "versions": {
            "linvision": linvision.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "pytorch_lightning": pl.__version__,
        },
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _unreadable(plan: Plan) -> dict[str, str]:
    return {**plan.train.unreadable, **plan.test.unreadable}


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
    unreadable = _unreadable(plan)
    if unreadable:
        notes().print(f"{len(unreadable)} images could not be read and were skipped:", markup=False)
        for reason in unreadable.values():
            notes().print(f"  {reason}", markup=False)
