"""The curves of a run."""

from pathlib import Path

from matplotlib.figure import Figure

from linvision.files import replacing
from linvision.training.task import Task

SPLITS = {"train": "training", "val": "validation"}


def draw_curves(
    path: Path, rows: list[dict[str, float]], title: str, *, task: Task, best: dict[str, float], note: str = ""
) -> None:
    """Draw a task's columns over the epochs, and mark the best; the note says how the curves are to be read."""
    figure = Figure(figsize=(4.5 * len(task.curves), 3.6), layout="constrained")
    figure.suptitle(plain(title))
    epochs = [row["epoch"] for row in rows]
    for axes, curve in zip(figure.subplots(1, len(task.curves), squeeze=False)[0], task.curves, strict=True):
        for split, style in (("train", "--"), ("val", "-")):
            name = f"{split}_{curve.name}"
            if name in task.columns:
                axes.plot(epochs, [row[name] * curve.scale for row in rows], style, label=SPLITS[split])
            if name == task.best:
                axes.plot(best["epoch"], best[name] * curve.scale, "o", color="black", fillstyle="none")
                axes.set_title(f"best {task.format(name, best[name])} in epoch {best['epoch']:.0f}", fontsize=9)
        axes.axvline(best["epoch"], color="grey", linewidth=0.8, linestyle=":")
        axes.set(xlabel="epoch", ylabel=curve.label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.supxlabel(note, fontsize=8, color="grey")
    save_figure(figure, path)


def plain(text: str) -> str:
    """Return a text that matplotlib takes for no formula: names of data and classes may hold dollar signs."""
    return text.replace("$", r"\$")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a picture as PNG, in one piece."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
