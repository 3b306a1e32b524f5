"""Draws pictures as SVG that stands in a page: text stays text, and colours are those of the page, light or dark.

svg = draw(picture, "p1")
"""

import io
import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from onebit.readings import Figure
from onebit.report import words
from onebit.report.pictures import Axis, Bar, Bars, Mark, Points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

# As wide as the screen of a phone, so that letters are as large there as those of the page.
WIDTH = 360.0
HEIGHT = 270.0
SIZE, SMALL = 12.5, 11.0
POINTS_PER_INCH = 72.0
N_COLOURS = 8
# Colours that stand for variables of the page's style sheet.
_COLOURS = {"#00000a": "--ink", "#00000b": "--soft", "#00000c": "--line", "#00000d": "--panel"}
_INK, _SOFT, _LINE, _PANEL = _COLOURS
_SERIES = [f"#0000{16 + i:02x}" for i in range(N_COLOURS)]
_VARIABLES = _COLOURS | {colour: f"--c{i}" for i, colour in enumerate(_SERIES)}
# In what matplotlib writes, texts and attributes hold neither < nor >.
_TAG = re.compile(r"<[^>]*>")
_USE = re.compile(r'(?:href="#|url\(#)([^")]+)')
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "onebit",
    # Names are of others; a dollar begins no formula.
    "text.parse_math": False,
    "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": SIZE,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _SOFT,
    "axes.labelsize": SMALL,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.formatter.useoffset": False,
    "grid.color": _LINE,
    "grid.linewidth": 0.7,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _SOFT,
    "ytick.labelcolor": _SOFT,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
}


def draw(picture: Points | Bars, name: str) -> str:
    """The SVG element of a picture.

    Args:
        picture: what to draw.
        name: of the element; that of its parts begin with it.
    """
    import matplotlib

    # Letters that the font of the measurements lacks are drawn by the reader's browser.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    with matplotlib.rc_context(_STYLE):
        canvas = _points(picture) if isinstance(picture, Points) else _bars(picture)
        return _element(canvas, name)


def _canvas(height: float) -> "tuple[Canvas, Axes]":
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(WIDTH / POINTS_PER_INCH, height / POINTS_PER_INCH), facecolor="none")
    return canvas, canvas.add_axes((0.0, 0.0, 1.0, 1.0))


def _points(picture: Points) -> "Canvas":
    canvas, axes = _canvas(HEIGHT)
    axes.set_position((0.145, 0.165, 0.825, 0.795))
    x_scale, y_scale = (_scale([getattr(m, k) for m in picture.marks], a) for k, a in _both(picture))
    for mark in picture.marks:
        _mark(axes, mark, x_scale, y_scale)
    axes.set_xlabel(_title(picture.x, x_scale[1]))
    axes.set_ylabel(_title(picture.y, y_scale[1]))
    xs = [_value(m.x) / x_scale[0] for m in picture.marks]
    if max(xs) > 10 * min(xs) > 0:
        axes.set_xscale("log")
        axes.set_xlim(min(xs) / 2.2, max(xs) * 2.2)
        axes.xaxis.set_major_formatter(lambda x, _: words.trim(words.digits(x)))
        axes.xaxis.set_minor_formatter(lambda x, _: "")
    else:
        ends = [
            e / x_scale[0] for m in picture.marks for e in (m.x.value, m.x.low, m.x.high) if e is not None
        ]
        low, high = min(ends), max(ends)
        margin = (high - low) * 0.25 or abs(high) * 0.5 or 1.0
        axes.set_xlim(low - margin, high + margin)
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter(lambda x, _: words.trim(words.digits(x)))
    ends = [e / y_scale[0] for m in picture.marks for e in (m.y.value, m.y.low, m.y.high) if e is not None]
    margin = (max(ends) - min(ends)) * 0.35 or abs(max(ends)) * 0.1 or 1.0
    axes.set_ylim(min(ends) - margin, max(ends) + margin)
    axes.locator_params(axis="y", nbins=5)
    axes.grid(True)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    _names(canvas, axes, picture.marks, x_scale[0], y_scale[0])
    return canvas


def _both(picture: Points) -> tuple[tuple[str, Axis], tuple[str, Axis]]:
    return ("x", picture.x), ("y", picture.y)


def _mark(axes: "Axes", mark: Mark, x_scale: tuple[float, str], y_scale: tuple[float, str]) -> None:
    colour = _SERIES[mark.colour % N_COLOURS]
    axes.errorbar(
        _value(mark.x) / x_scale[0],
        _value(mark.y) / y_scale[0],
        xerr=_error(mark.x, x_scale[0]),
        yerr=_error(mark.y, y_scale[0]),
        fmt="o",
        markersize=9,
        color=colour,
        markerfacecolor=colour if mark.quotable else _PANEL,
        markeredgewidth=2,
        elinewidth=2,
    )


def _names(canvas: "Canvas", axes: "Axes", marks: Sequence[Mark], x_scale: float, y_scale: float) -> None:
    """Write the names beside their marks, none on another one."""
    step = (SIZE + 4) / POINTS_PER_INCH
    # Left and right end and height of what is there already, in inches: first the marks.
    taken: list[tuple[float, float, float]] = []
    for mark in marks:
        place = axes.transData.transform((_value(mark.x) / x_scale, _value(mark.y) / y_scale))
        taken.append((place[0] / canvas.dpi - 0.08, place[0] / canvas.dpi + 0.08, place[1] / canvas.dpi))
    for mark in sorted(marks, key=lambda m: _value(m.y)):
        place = axes.transData.transform((_value(mark.x) / x_scale, _value(mark.y) / y_scale))
        x, y = (float(p) / canvas.dpi for p in place)
        width = len(mark.name) * 0.56 * SIZE / POINTS_PER_INCH
        right = x + width + 0.15 < WIDTH / POINTS_PER_INCH
        left = x + 0.12 if right else x - 0.12 - width
        # Above, below, and then wherever there is room above.
        for y_name in (y + 0.12, y - 0.12, *(y + 0.12 + i * step for i in range(1, 2 * len(marks) + 1))):
            if not any(
                abs(y_name - o) < step and left < end and begin < left + width for begin, end, o in taken
            ):
                break
        y = y_name
        taken.append((left, left + width, y))
        at = (x + 0.12 if right else x - 0.12, y)
        canvas.text(
            at[0] * POINTS_PER_INCH / WIDTH,
            at[1] * POINTS_PER_INCH / HEIGHT,
            mark.name,
            ha="left" if right else "right",
            va="center",
        )


def _bars(picture: Bars) -> "Canvas":
    """Rows of name and figure, with a bar, or a dot on a line, below."""
    rooms = [50.0 if bar.note else 36.0 for bar in picture.bars]
    groups = [bar.group for bar in picture.bars]
    heads = [
        24.0 if group and group != before else 0.0
        for before, group in zip(["", *groups], groups, strict=False)
    ]
    below = 4.0 if picture.from_zero else 28.0
    height = sum(rooms) + sum(heads) + below
    canvas, axes = _canvas(height)
    axes.set_position((0.0, 0.0, 1.0, 1.0))
    axes.set_ylim(0, height)
    axes.axis("off")
    divisor, unit = _scale([bar.figure for bar in picture.bars], picture.axis)
    ends = [e / divisor for b in picture.bars for e in (b.figure.value, b.figure.high) if e is not None]
    # A share has a whole; other lengths end at the longest.
    whole = 100.0 if picture.axis.unit == "share" and not picture.from_zero else max([*ends, 0.0]) or 1.0
    margin = 0.014 * whole
    axes.set_xlim(-margin, whole + margin)
    top = height
    for bar, room, head in zip(picture.bars, rooms, heads, strict=True):
        if head:
            axes.text(0, top - 13, bar.group, va="center", color=_SOFT)
        top -= head
        _bar(axes, bar, top, room, divisor, unit, whole, picture.from_zero)
        top -= room
    if not picture.from_zero:
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            side = {0.0: "left", 1.0: "right"}.get(share, "center")
            text = words.trim(words.digits(share * whole)) + (f" {unit}" if share == 1.0 else "")
            axes.text(share * whole, 8, text, ha=side, va="center", color=_SOFT, fontsize=SMALL)
            axes.plot([share * whole] * 2, [18, height - 24], color=_LINE, linewidth=0.7, zorder=0)
    return canvas


def _bar(
    axes: "Axes", bar: Bar, top: float, room: float, divisor: float, unit: str, whole: float, is_bar: bool
) -> None:
    colour = _SERIES[bar.colour % N_COLOURS]
    value = _value(bar.figure) / divisor
    axes.text(0, top - 10, bar.name, va="center")
    amount = f"{words.digits(value)} {unit}".strip() + ("" if bar.quotable else " *")
    axes.text(whole, top - 10, amount, ha="right", va="center", fontweight="bold")
    if bar.note:
        axes.text(0, top - 24, bar.note, va="center", color=_SOFT, fontsize=SMALL)
    y = top - room + 11
    error = _error(bar.figure, divisor)
    if is_bar:
        axes.barh(y, whole, height=7, color=_LINE, alpha=0.45)
        face = colour if bar.quotable else _PANEL
        axes.barh(y, value, height=7, color=face, edgecolor=colour, linewidth=1)
        axes.errorbar(value, y, xerr=error, fmt="none", ecolor=_INK, elinewidth=1.3, capsize=2.5)
    else:
        axes.errorbar(value, y, xerr=error, fmt="o", color=colour, markersize=8, elinewidth=3)


def _value(figure: Figure) -> float:
    return 0.0 if figure.value is None else float(figure.value)


def _error(figure: Figure, divisor: float) -> Any:
    """How far the interval goes below and above, as matplotlib wants it."""
    if figure.low is None or figure.high is None:
        return None
    value = _value(figure)
    return [[max(value - figure.low, 0.0) / divisor], [max(figure.high - value, 0.0) / divisor]]


def _scale(figures: Sequence[Figure], axis: Axis) -> tuple[float, str]:
    return words.scale(max(map(_value, figures)), axis.unit)


def _title(axis: Axis, unit: str) -> str:
    better = {"low": " (less is better)", "high": " (more is better)"}.get(axis.best, "")
    return (f"{axis.title}, {unit}" if unit else axis.title) + better


def _element(canvas: "Canvas", name: str) -> str:
    """The canvas as an element of HTML: nothing of matplotlib's own style, and identifiers of this picture only."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    canvas.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    used = dict.fromkeys(identifier for tag in _TAG.findall(text) for identifier in _USE.findall(tag))
    places = {old: f"{name}-{i}" for i, old in enumerate(used)}
    return re.sub(r"\n\s*", "\n", _TAG.sub(lambda tag: _for_page(tag[0], places), text)).strip()


def _for_page(tag: str, places: dict[str, str]) -> str:
    tag = re.sub(r' (?:xmlns(?::xlink)?|version)="[^"]*"', "", tag).replace("xlink:href", "href")
    if tag.startswith("<svg"):
        # The page says how wide.
        tag = re.sub(r' (?:width|height)="[^"]*"', "", tag)
    tag = re.sub(r' id="([^"]*)"', lambda m: f' id="{places[m[1]]}"' if m[1] in places else "", tag)
    tag = _USE.sub(lambda m: m[0].replace(m[1], places[m[1]]), tag)
    return re.sub(
        r"#[0-9a-f]{6}\b", lambda m: f"var({_VARIABLES[m[0]]})" if m[0] in _VARIABLES else m[0], tag
    )
