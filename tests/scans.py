"""Pages as pictures, for the tests of OCR."""

from __future__ import annotations

import io

from PIL import Image, ImageDraw, ImageFont


def draw_page(text: str) -> Image.Image:
    """A page with one line on it."""
    image = Image.new("RGB", (1240, 400), "white")
    ImageDraw.Draw(image).text((80, 150), text, "black", ImageFont.load_default(48))
    return image


def save_images(image: Image.Image, kind: str, *others: Image.Image) -> bytes:
    """One file of all the images."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"save_all": True, "append_images": others} if others else {}))
    return buffer.getvalue()
