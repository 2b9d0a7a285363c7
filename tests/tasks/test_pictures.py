"""The pictures of classification."""

import torch

from linvision.tasks.pictures import Examples, draw_confusion, draw_predictions


def test_names_with_dollar_signs_are_no_formulas(tmp_path):
    classes = (r"A$ $\frac", "US$", "$^$")
    draw_confusion(tmp_path / "a.png", torch.eye(3, dtype=torch.long), classes, r"on $\frac$")
    labels = torch.tensor([0, 2])
    group = Examples("2 mistakes", torch.zeros(2, 3, 4, 4), labels, labels.flip(0), torch.ones(2))
    draw_predictions(tmp_path / "b.png", [group], classes, r"on $\frac$")
    assert (tmp_path / "b.png").stat().st_size
