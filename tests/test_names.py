"""Names of files and folders that terminals and encodings do not take as they are."""

import io
import json
import os
import sys

import pytest
from rich.table import Table

from linvision import console
from linvision.cli import main
from linvision.errors import printable
from linvision.files import write_json

LATIN = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("größe 图片 👍", "größe 图片 👍"),
        (LATIN, r"caf\xe9"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("two\nlines\r\x85", r"two\x0alines\x0d\x85"),
        ("gpj\u202e.exe\u2066", r"gpj\u202e.exe\u2066"),
        ("\ud800", r"\ud800"),
    ],
)
def test_what_harms_is_escaped_and_the_rest_left_alone(name, shown):
    assert printable(name) == shown
    assert shown.isprintable()


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_consoles_write_any_name(monkeypatch, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    console.output().print(f"{LATIN} \x1b]0;x\x07 ☃\nline", markup=False)
    table = Table("image")
    table.add_row(f"{LATIN}\x9b")
    console.output().print(table)
    stream.flush()
    text = stream.buffer.getvalue().decode(encoding)
    assert text.startswith(r"caf\xe9 \x1b]0;x\x07 " + ("☃" if encoding == "utf-8" else r"\u2603") + "\nline")
    assert r"caf\xe9\x9b" in text


def test_json_gives_names_back_as_they_are(tmp_path, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    console.write_json([LATIN, "é"])
    write_json(tmp_path / "a.json", [LATIN, "é"])
    stream.flush()
    for text in (stream.buffer.getvalue().decode(), (tmp_path / "a.json").read_text(encoding="utf-8")):
        assert json.loads(text) == [LATIN, "é"]
        assert "é" in text


def test_errors_show_names_as_escapes(capfd):
    assert main(["predict", f"\x1b[2J{LATIN}.jpg"]) == 2
    error = capfd.readouterr().err
    assert "\x1b" not in error
    assert r"\x1b[2Jcaf\xe9.jpg" in error
