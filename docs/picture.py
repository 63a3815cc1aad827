"""Draws format.svg: the nested planes of a code, and a token whose channels are graded.

Run it after a change: python docs/picture.py
"""

from __future__ import annotations

from pathlib import Path

WIDTHS = (2, 2, 2, 2)  # the default
COLOURS = ("#08519c", "#2171b5", "#4292c6", "#9ecae1")
INK, FAINT = "#24292f", "#c9d1d9"
# The importance of one token's channels, and the thresholds they meet, in units of the tallest bar.
IMPORTANCE = (0.31, 0.05, 0.58, 0.12, 0.02, 0.95, 0.22, 0.08, 0.40, 0.03, 0.71, 0.16, 0.27, 0.06, 0.10, 0.47)
THRESHOLDS = (0.09, 0.2, 0.42, 0.8)


def rectangle(x: float, y: float, width: float, height: float, fill: str, stroke: str = "none") -> str:
    """An SVG rectangle."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2" fill="{fill}" stroke="{stroke}"/>'


def text(
    x: float, y: float, words: str, size: int = 12, anchor: str = "start", fill: str = INK, bold: bool = False
) -> str:
    """An SVG text."""
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{fill}"{weight}>{words}</text>'


def dashed(x1: float, x2: float, y: float) -> str:
    """A dashed horizontal SVG line."""
    style = f'stroke="{INK}" stroke-dasharray="3 3" stroke-width="0.8"'
    return f'<line x1="{x1:g}" y1="{y:g}" x2="{x2:g}" y2="{y:g}" {style}/>'


def code_planes(left: float, top: float) -> list[str]:
    """Left panel: which bits of a code each grade reads."""
    cell, row = 26, 30
    shapes = [text(left, top, "A weight is stored once, in planes of its bits", 13, bold=True)]
    shapes.append(text(left + 78, top + 26, "most significant", 10, fill="#57606a"))
    shapes.append(text(left + 78 + 8 * cell, top + 26, "least", 10, "end", "#57606a"))
    for grade in range(len(WIDTHS), -1, -1):
        y = top + 36 + (len(WIDTHS) - grade) * row
        bits = sum(WIDTHS[:grade])
        shapes.append(text(left, y + 17, f"grade {grade}"))
        x = left + 78.0
        for plane, width in enumerate(WIDTHS):
            read = plane < grade
            for bit in range(width):
                fill = COLOURS[plane] if read else "#ffffff"
                shapes.append(rectangle(x + bit * cell + 1, y, cell - 2, 22, fill, "none" if read else FAINT))
            x += width * cell
        shapes.append(text(x + 12, y + 17, f"{bits} bits" if grade else "skipped"))
    x = left + 78.0
    y = top + 36 + (len(WIDTHS) + 1) * row + 2
    for plane, width in enumerate(WIDTHS):
        shapes.append(rectangle(x + 2, y, width * cell - 4, 3, COLOURS[plane]))
        shapes.append(text(x + width * cell / 2, y + 18, f"{plane}", 11, "middle"))
        x += width * cell
    shapes.append(text(left, y + 18, "plane"))
    shapes.append(text(left, y + 46, "Each plane is a tensor of its own, so bits that"))
    shapes.append(text(left, y + 62, "a grade leaves out are never fetched."))
    return shapes


def graded_token(left: float, top: float) -> list[str]:
    """Right panel: importance against thresholds, and the planes that are read for each channel."""
    cell, tall, bit = 24, 110, 9
    width = cell * len(IMPORTANCE)
    shapes = [text(left, top, "A token grades its channels, from its activations", 13, bold=True)]
    base = top + 26 + tall
    for grade, threshold in enumerate(THRESHOLDS, 1):
        y = base - threshold * tall
        shapes.append(dashed(left, left + width, y))
        shapes.append(text(left + width + 6, y + 4, f"grade {grade}", 10))
    total = 0
    for channel, importance in enumerate(IMPORTANCE):
        x = left + channel * cell
        shapes.append(rectangle(x + 5, base - importance * tall, cell - 10, importance * tall, "#57606a"))
        grade = sum(importance >= threshold for threshold in THRESHOLDS)
        total += sum(WIDTHS[:grade])
        y = base + 12.0
        for plane, plane_width in enumerate(WIDTHS):
            read = plane < grade
            fill = COLOURS[plane] if read else "#ffffff"
            shapes.append(rectangle(x + 3, y + 0.5, cell - 6, plane_width * bit - 1, fill, "none" if read else FAINT))
            y += plane_width * bit
    shapes.append(text(left, top + 20, "importance of each channel: |x| * weight", 10, fill="#57606a"))
    shapes.append(text(left + width + 6, base + 52, "planes read", 10, fill="#57606a"))
    y = base + 12 + sum(WIDTHS) * bit + 24
    mean = total / len(IMPORTANCE)
    shapes.append(
        text(left, y, f"Read bits of this token: {total} / {len(IMPORTANCE)} channels = {mean:.2f} of 8 per weight.")
    )
    shapes.append(text(left, y + 16, "Moving the thresholds moves this number; nothing is repacked."))
    return shapes


def main() -> None:
    """Writes the picture beside this script."""
    shapes = [*code_planes(24, 32), *graded_token(440, 32)]
    drawing = "\n".join(
        [
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 920 302" '
            'font-family="Helvetica, Arial, sans-serif" role="img" '
            'aria-label="Nested bit planes of a code, and a token whose channels are graded">',
            '<rect width="920" height="302" rx="8" fill="#ffffff"/>',
            *shapes,
            "</svg>",
        ]
    )
    Path(__file__).with_name("format.svg").write_text(drawing + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
