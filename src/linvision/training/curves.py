"""The curves of a run."""

from pathlib import Path

from matplotlib.figure import Figure

from linvision.files import replacing
from linvision.training.task import Task


def draw_curves(path: Path, rows: list[dict[str, float]], title: str, *, task: Task, best: dict[str, float]) -> None:
    """Draw a task's columns over the epochs, and mark the best."""
    figure = Figure(figsize=(4.5 * len(task.curves), 3.6), layout="constrained")
    figure.suptitle(title)
    epochs = [row["epoch"] for row in rows]
    for axes, curve in zip(figure.subplots(1, len(task.curves), squeeze=False)[0], task.curves, strict=True):
        for split, style in (("train", "--"), ("test", "-")):
            name = f"{split}_{curve.name}"
            if name in task.columns:
                axes.plot(epochs, [row[name] * curve.scale for row in rows], style, label=split)
            if name == task.best:
                axes.axhline(best[name] * curve.scale, color="grey", linewidth=0.8, linestyle=":")
                axes.set_title(f"best {task.format(name, best[name])} in epoch {best['epoch']:.0f}", fontsize=9)
        axes.set(xlabel="epoch", ylabel=curve.label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a picture as PNG, in one piece."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
