"""A picture's panels on one sheet: a PNG with a caption under each."""

from __future__ import annotations

import io
import math

from PIL import Image, ImageDraw, ImageFont

from pipeline.pictures.picture import Picture

PANEL_SIDE = 224  # pixels that a small panel's shorter side is enlarged to
MAX_SIDE = 1024  # and that a large panel's longer side is reduced to
MAX_COLUMNS = 5
GAP, TEXT_SIZE = 8, 14
PAPER, INK = "white", (28, 32, 36)


def sheet(picture: Picture) -> bytes:
    """PNG of the panels side by side, in rows of at most `MAX_COLUMNS`."""
    font = ImageFont.load_default(TEXT_SIZE)
    panels = [(caption, _shown(Image.fromarray(p.permute(1, 2, 0).numpy()))) for caption, p in picture.panels]
    columns = min(len(panels), MAX_COLUMNS)
    rows = math.ceil(len(panels) / max(columns, 1))
    width = max(panel.width for _, panel in panels)
    height = max(panel.height for _, panel in panels)
    line = 2 * TEXT_SIZE
    canvas = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + line + GAP) + GAP), PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, (caption, panel) in enumerate(panels):
        left = GAP + i % columns * (width + GAP)
        top = GAP + i // columns * (height + line + GAP)
        canvas.paste(panel, (left, top))
        draw.text((left, top + panel.height + 4), _cut_short(caption, width, font), fill=INK, font=font)
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    return buffer.getvalue()


def _shown(panel: Image.Image) -> Image.Image:
    """Small panels are enlarged by a whole factor, so that patches stay sharp; large ones are reduced."""
    factor = PANEL_SIDE // min(panel.size)
    if factor > 1:
        return panel.resize((panel.width * factor, panel.height * factor), Image.Resampling.NEAREST)
    if max(panel.size) > MAX_SIDE:
        panel.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.BICUBIC)
    return panel


def _cut_short(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
