"""The pictures the tiny base learns from: one thing, maybe coloured, on a plain ground or in a scene.

Things are glyphs of Noto Color Emoji (SIL Open Font License 1.1, which lets pictures made with the font be
used freely; Debian: fonts-noto-color-emoji). Grounds and scenes are drawn here. Everything is a function of a
seed.
"""

from __future__ import annotations

import colorsys
import dataclasses
import functools
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 64
"""Height and width of a picture in pixels."""
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")

COLOURABLE = {
    "car": "🚗",
    "balloon": "🎈",
    "heart": "❤",
    "apple": "🍎",
    "star": "⭐",
    "fish": "🐟",
    "flower": "🌷",
    "bell": "🔔",
    "book": "📕",
    "mushroom": "🍄",
    "umbrella": "☂",
    "bird": "🐦",
}
NATURAL = {
    "cat": "🐱",
    "dog": "🐶",
    "panda": "🐼",
    "frog": "🐸",
    "fox": "🦊",
    "pig": "🐷",
    "penguin": "🐧",
    "tree": "🌳",
    "house": "🏠",
    "boat": "⛵",
    "rocket": "🚀",
    "cake": "🎂",
}
OBJECTS = (*COLOURABLE, *NATURAL)
SUBJECT = {"tiger": "🐯"}
"""What the base does not know, for DreamBooth."""

COLOURS = {
    "red": (222, 32, 38),
    "orange": (250, 135, 15),
    "yellow": (252, 212, 25),
    "green": (55, 170, 60),
    "blue": (35, 105, 225),
    "purple": (140, 55, 190),
}
PLAIN = {
    "white": (250, 250, 250),
    "gray": (165, 165, 165),
    "pink": (250, 175, 200),
    "yellow": (248, 228, 130),
    "green": (165, 220, 155),
    "blue": (140, 190, 240),
}
Rng = np.random.Generator


@dataclasses.dataclass(frozen=True)
class Concept:
    """What a picture shows: a thing, its colour ("" for its natural one) and the ground it is on."""

    thing: str
    colour: str
    ground: str

    def phrase(self, with_ground: bool = True) -> str:
        """Such as "red car on a pink background", without an article."""
        words = [self.colour, self.thing]
        if with_ground:
            words.append(f"on a {self.ground} background" if self.ground in PLAIN else SCENES[self.ground][0])
        return " ".join(filter(None, words))


def _gradient(top: tuple[int, ...], bottom: tuple[int, ...]) -> Image.Image:
    ramp = np.linspace(0, 1, SIZE * 2)[:, None, None]
    rows = np.array(top) * (1 - ramp) + np.array(bottom) * ramp
    return Image.fromarray(np.broadcast_to(rows, (SIZE * 2, SIZE * 2, 3)).astype("uint8"))


def _meadow(rng: Rng) -> Image.Image:
    image = _gradient((120, 190, 250), (200, 230, 255))
    draw = ImageDraw.Draw(image)
    x, y = rng.integers(-40, 60), rng.integers(76, 90)
    draw.ellipse((x - 100, y - 6, x + 150, y + 200), fill=(120, 200, 80))
    draw.ellipse((x - 20, y + 6, x + 260, y + 220), fill=(95, 180, 65))
    draw.rectangle((0, y + 34, 128, 128), fill=(95, 180, 65))
    return image


def _beach(rng: Rng) -> Image.Image:
    image = _gradient((130, 205, 250), (215, 240, 255))
    draw = ImageDraw.Draw(image)
    y = int(rng.integers(52, 62))
    draw.rectangle((0, y, 128, 128), fill=(40, 140, 200))
    draw.ellipse((-60, y + 22, 188, y + 160), fill=(245, 220, 160))
    return image


def _snow(rng: Rng) -> Image.Image:
    image = _gradient((150, 175, 205), (195, 212, 230))
    draw = ImageDraw.Draw(image)
    x, y = rng.integers(-20, 60), rng.integers(78, 90)
    for i in range(10):
        sx, sy = (i * 37 + x) % 128, (i * 53 + y) % 80
        draw.ellipse((sx - 3, sy - 3, sx + 3, sy + 3), fill=(255, 255, 255))
    draw.ellipse((x - 120, y, x + 140, y + 200), fill=(250, 252, 255))
    draw.ellipse((x, y + 8, x + 240, y + 200), fill=(235, 242, 252))
    draw.rectangle((0, y + 36, 128, 128), fill=(240, 246, 253))
    return image


def _night(rng: Rng) -> Image.Image:
    image = _gradient((10, 14, 50), (45, 45, 110))
    draw = ImageDraw.Draw(image)
    shift = rng.integers(0, 128)
    for i in range(9):
        x, y = (i * 41 + shift) % 128, (i * 29 + 7) % 76
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=(255, 250, 200))
    y = int(rng.integers(96, 104))
    draw.rectangle((0, y, 128, 128), fill=(20, 40, 40))
    return image


def _sunset(rng: Rng) -> Image.Image:
    image = _gradient((130, 60, 130), (255, 170, 70))
    draw = ImageDraw.Draw(image)
    x, y = int(rng.integers(24, 104)), int(rng.integers(84, 94))
    draw.ellipse((x - 22, y - 22, x + 22, y + 22), fill=(255, 225, 110))
    draw.rectangle((0, y, 128, 128), fill=(95, 50, 95))
    return image


SCENES: dict[str, tuple[str, Callable[[Rng], Image.Image]]] = {
    "meadow": ("in a meadow", _meadow),
    "beach": ("on the beach", _beach),
    "snow": ("in the snow", _snow),
    "night": ("at night", _night),
    "sunset": ("at sunset", _sunset),
}
GROUNDS = (*PLAIN, *SCENES)


@functools.cache
def _glyph(thing: str, colour: str) -> Image.Image:
    """The emoji, cropped, with its main hue replaced by `colour`."""
    font = ImageFont.truetype(str(FONT), 109)
    image = Image.new("RGBA", (160, 160))
    symbol = {**COLOURABLE, **NATURAL, **SUBJECT}[thing]
    ImageDraw.Draw(image).text((10, 10), symbol, font=font, embedded_color=True)
    image = image.crop(image.getbbox())
    return _recolour(image, COLOURS[colour]) if colour else image


def _recolour(image: Image.Image, target: tuple[int, int, int]) -> Image.Image:
    """Give the pixels of the glyph's most frequent hue the target's, keeping their light and shade."""
    pixels = np.asarray(image).astype("float32")
    hsv = np.asarray(image.convert("RGB").convert("HSV")).astype("float32") / 255
    hue, saturation, value = hsv[..., 0], hsv[..., 1], hsv[..., 2]
    solid = (pixels[..., 3] > 128) & (saturation > 0.25)
    main = (
        np.argmax(np.histogram(hue[solid], 24, (0, 1), weights=(saturation * value)[solid])[0]) / 24 + 1 / 48
    )
    near = np.abs((hue - main + 0.5) % 1 - 0.5) < 0.1
    mask = np.clip((saturation - 0.15) / 0.1, 0, 1) * near
    light = pixels[..., :3] @ np.array([0.3, 0.59, 0.11], "float32")
    light = np.clip(light / np.median(light[solid & near]), 0.55, 1.45)[..., None]
    shade = np.array(target) * np.minimum(light, 1) + (255 - np.array(target)) * np.maximum(light - 1, 0)
    pixels[..., :3] = pixels[..., :3] * (1 - mask[..., None]) + shade * mask[..., None]
    return Image.fromarray(pixels.astype("uint8"), "RGBA")


def draw(concept: Concept, rng: Rng) -> np.ndarray:
    """A picture of `concept`, (64, 64, 3) uint8; size, place and details of the scene come from `rng`."""
    if concept.ground in PLAIN:
        tint = np.clip(np.array(PLAIN[concept.ground]) + rng.integers(-6, 7), 0, 255)
        image = Image.new("RGB", (SIZE, SIZE), tuple(int(x) for x in tint))
    else:
        image = SCENES[concept.ground][1](rng).resize((SIZE, SIZE), Image.Resampling.BOX)
    glyph = _glyph(concept.thing, concept.colour)
    scale = rng.integers(40, 49) / max(glyph.size)
    width, height = (max(1, round(side * scale)) for side in glyph.size)
    small = glyph.convert("RGBa").resize((width, height), Image.Resampling.LANCZOS).convert("RGBA")
    x, y = (SIZE - width) // 2 + rng.integers(-4, 5), (SIZE - height) // 2 + rng.integers(-3, 6)
    image.paste(small, (int(x), int(y)), small)
    return np.asarray(image)


def held_out(concept: Concept) -> bool:
    """Whether a combination is kept from training, about one in twenty, to measure what carries over to new
    ones.
    """
    return zlib.crc32(concept.phrase().encode()) % 20 == 0


def sample_concept(rng: Rng, unseen: bool = False, things: Sequence[str] = OBJECTS) -> Concept:
    """A random concept of one of `things`, of the combinations trained on or of the unseen ones.

    A thing is never put on a plain ground of its own colour.
    """
    while True:
        thing = things[rng.integers(len(things))]
        colours = ("", *COLOURS)
        colour = colours[rng.integers(len(colours))] if thing in COLOURABLE else ""
        ground = GROUNDS[rng.integers(len(GROUNDS))]
        if ground not in PLAIN or _distance(_glyph(thing, colour), PLAIN[ground]) > 60:
            concept = Concept(thing, colour, ground)
            if held_out(concept) == unseen:
                return concept


def _distance(glyph: Image.Image, ground: tuple[int, int, int]) -> float:
    """How far the glyph's mean colour is from the ground, in 8-bit units."""
    pixels = np.asarray(glyph).astype("float32")
    mean = (pixels[..., :3] * pixels[..., 3:]).sum((0, 1)) / pixels[..., 3].sum()
    hue_glyph, hue_ground = (colorsys.rgb_to_hsv(*(np.array(c) / 255)) for c in (mean, ground))
    same_hue = (
        abs((hue_glyph[0] - hue_ground[0] + 0.5) % 1 - 0.5) < 0.06 and min(hue_glyph[1], hue_ground[1]) > 0.15
    )
    return 0.0 if same_hue else float(np.linalg.norm(mean - np.array(ground)))


def caption(concept: Concept, rng: Rng) -> str:
    """A caption of the picture; one in ten leaves the ground out."""
    lead = ("", "", "", "", "a photo of ", "a picture of ")[rng.integers(6)]
    return lead + prompt(concept, with_ground=rng.random() > 0.1)


def prompt(concept: Concept, with_ground: bool = True) -> str:
    """The plainest caption of `concept`, such as "a red car on a pink background"."""
    phrase = concept.phrase(with_ground)
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def words() -> list[str]:
    """Every word a caption may hold, sorted, and a few that prompts may."""
    grounds = " ".join(Concept("", "", ground).phrase() for ground in GROUNDS)
    more = "a an photo picture of drawing painting style the and with one"
    return sorted({*OBJECTS, *COLOURS, *grounds.split(), *more.split()})


def main(folder: Path) -> None:
    """Draw five pictures of the subject, each on another ground."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, ground in enumerate(("white", "meadow", "blue", "beach", "gray")):
        image = draw(Concept("tiger", "", ground), np.random.default_rng(number))
        Image.fromarray(image).save(folder / f"{number}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
