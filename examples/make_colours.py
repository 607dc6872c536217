"""Make `src/dspy_otel/cli/demo/colours.csv`, the data set of `dspy-otel demo`.

Source: the colour survey of xkcd.com (2010, https://xkcd.com/color/rgb/): 949 colour names, each with the RGB value
that its several hundred thousand answers agreed on. Licence: CC0 1.0 (public domain). matplotlib ships the list as
`matplotlib.colors.XKCD_COLORS`, and that copy is read here. Run: `pip install matplotlib`, then this script.

Names with a coarse word are left out; nothing else is. Two columns are added from the RGB value alone, never from
the name:

* `family`, one of eleven basic colour terms (Berlin and Kay, 1969), by the rule in `family()`;
* `split`, `train` or `val` (one in three), by the last digit of a SHA-1 over the name.
"""

from __future__ import annotations

import csv
import hashlib
import math
import re
from pathlib import Path

TARGET = Path(__file__).parent.parent / "src/dspy_otel/cli/demo/colours.csv"
COARSE = re.compile(r"shit|poo(p|$|\s)|puke|piss|vomit|barf|snot|booger|diarrhea|bile")


def lightness_chroma_hue(rgb: str) -> tuple[float, float, float]:
    """CIELAB (D65) lightness 0-100, chroma, and hue in degrees, of an `#rrggbb` value in sRGB (IEC 61966-2-1)."""
    channels = [int(rgb[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    x = (0.4124564 * r + 0.3575761 * g + 0.1804375 * b) / 0.95047
    y = 0.2126729 * r + 0.7151522 * g + 0.0721750 * b
    z = (0.0193339 * r + 0.1191920 * g + 0.9503041 * b) / 1.08883
    fx, fy, fz = (t ** (1 / 3) if t > 216 / 24389 else (24389 / 27 * t + 16) / 116 for t in (x, y, z))
    a, b_ = 500 * (fx - fy), 200 * (fy - fz)
    return 116 * fy - 16, math.hypot(a, b_), math.degrees(math.atan2(b_, a)) % 360


def family(rgb: str) -> str:
    """The basic colour of an `#rrggbb` value: grey tones by lightness, all others by hue, split by lightness."""
    light, chroma, hue = lightness_chroma_hue(rgb)
    if light < 2:
        return "black"
    if chroma < 12:
        return "black" if light < 20 else "white" if light >= 92 else "grey"
    if hue >= 340 or hue < 20:
        return "pink" if light >= 42 else "purple" if hue >= 340 else "red"
    if hue < 42:
        return "pink" if light >= 66 else "red"
    if hue < 78:
        if light >= 50 and chroma >= 50:
            return "orange"
        return "pink" if light >= 75 and hue < 60 else "brown"
    if hue < 100:
        return "yellow" if light >= 88 or (light >= 68 and chroma >= 45) else "brown"
    if hue < 112:
        return "yellow" if light >= 75 else "green"
    if hue < 190:
        return "green"
    if hue < 307:
        return "blue"
    return "pink" if light >= 62 and hue >= 322 else "purple"


def main() -> None:
    from matplotlib.colors import XKCD_COLORS

    rows = []
    for key, rgb in sorted(XKCD_COLORS.items()):
        name = key.removeprefix("xkcd:")
        if not COARSE.search(name):
            split = "val" if hashlib.sha1(name.encode()).digest()[-1] % 3 == 0 else "train"
            rows.append((name, rgb, family(rgb), split))
    with TARGET.open("w", newline="") as out:
        out.write("# Colour names of the xkcd.com survey, https://xkcd.com/color/rgb/ - CC0 1.0 (public domain).\n")
        out.write("# family and split are derived; made by examples/make_colours.py.\n")
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("name", "rgb", "family", "split"))
        writer.writerows(rows)
    print(f"{len(rows)} names written to {TARGET}")


if __name__ == "__main__":
    main()
