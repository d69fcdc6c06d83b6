"""The contact sheet: rows and columns of small pictures with their names, as one image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_CELL, _GAP, _MARGIN = 128, 8, 24  # pixels; a picture of 32 × 32 is shown four times as large, without smoothing
_LABELS = 210  # width of the column of row labels
_NAME, _NOTE = 22, 16  # heights of letters
_INK, _PALE, _PAPER = "#1f2328", "#6e7781", "#ffffff"


@dataclass(frozen=True)
class SheetRow:
    """One row: its name in lines, a line below it in smaller letters, and its pictures."""

    name: Sequence[str]
    note: str
    pictures: Sequence[Image.Image]


def contact_sheet(columns: Sequence[str], rows: Sequence[SheetRow], caption: Sequence[str]) -> Image.Image:
    """Draw the sheet: names of the columns above, of the rows at the left, lines of a caption below.

    Every row has a picture for each column.
    """
    name, note = (ImageFont.load_default(size) for size in (_NAME, _NOTE))
    pitch = _CELL + _GAP
    head, foot = _lines(max(len(_wrapped(column)) for column in columns), _NOTE), _lines(len(caption), _NOTE)
    left, top = _MARGIN + _LABELS, _MARGIN + head + _GAP
    width = left + len(columns) * pitch - _GAP + _MARGIN
    height = top + len(rows) * pitch - _GAP + _MARGIN // 2 + foot + _MARGIN
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for j, column in enumerate(columns):
        place = left + j * pitch + _CELL // 2, top - _GAP
        draw.multiline_text(place, "\n".join(_wrapped(column)), _INK, note, anchor="md", align="center")
    for i, row in enumerate(rows):
        y = top + i * pitch
        label = y + (_CELL - _lines(len(row.name), _NAME) - _lines(1, _NOTE)) // 2
        for k, line in enumerate(row.name):
            draw.text((_MARGIN, label + _lines(k, _NAME)), line, _INK, name)
        draw.text((_MARGIN, label + _lines(len(row.name), _NAME)), row.note, _PALE, note)
        for j, picture in enumerate(row.pictures):
            sheet.paste(picture.resize((_CELL, _CELL), Image.Resampling.NEAREST), (left + j * pitch, y))
    for k, line in enumerate(caption):
        draw.text((_MARGIN, height - _MARGIN - foot + _lines(k, _NOTE)), line, _PALE, note)
    return sheet


def _wrapped(name: str) -> list[str]:
    """A column's name, a word a line: a name is longer than its column is wide."""
    return name.split()


def _lines(count: int, size: int) -> int:
    """Height of so many lines."""
    return count * (size + 6)
