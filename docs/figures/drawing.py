"""Draw drawing.png, the sunflower that the README classifies: python docs/figures/drawing.py"""

import argparse
import math
from pathlib import Path

from PIL import Image, ImageDraw

SIDE = 256
SCALE = 4  # drawn 4 times as large and averaged down, which smooths the edges


def draw_sunflower() -> Image.Image:
    size = SIDE * SCALE
    image = Image.new("RGB", (size, size), "#6FA8DC")
    draw = ImageDraw.Draw(image)

    def disc(x: float, y: float, width: float, height: float, color: str) -> None:
        box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
        draw.ellipse([size * edge for edge in box], fill=color)

    draw.line([(0.5 * size, 0.5 * size), (0.52 * size, size)], fill="#38761D", width=size // 20)
    disc(0.7, 0.91, 0.38, 0.11, "#4C9A2A")
    for length, turn, color in ((0.41, 0.5, "#F1A208"), (0.38, 0, "#FFD23F")):
        for petal in range(18):
            shape = ((0.1, -0.5), (0.75 * length, -0.4), (length, 0), (0.75 * length, 0.4), (0.1, 0.5))
            angles = [math.tau * (petal + turn + across) / 18 for _, across in shape]
            points = [(size * (0.5 + out * math.cos(angle)), size * (0.45 + out * math.sin(angle)))
                      for (out, _), angle in zip(shape, angles, strict=True)]
            draw.polygon(points, fill=color, outline="#B87800", width=SCALE)
    disc(0.5, 0.45, 0.38, 0.38, "#5B3A1A")
    disc(0.5, 0.45, 0.26, 0.26, "#3B2410")
    return image.resize((SIDE, SIDE), Image.Resampling.BOX)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    draw_sunflower().save(Path(__file__).with_suffix(".png"), optimize=True)
