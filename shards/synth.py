"""The built-in demo dataset: drawn web screens with the programs that describe them.

Screens are in the language of pix2code's web data: a header of buttons, one of them active, above
rows of one, two or four cards. Pillow draws them with its own font, so nothing has to be fetched.
Packing them is `shards.pack`'s work.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from shards import engines
from shards.storage import UserError, command, exclusive, explained, local_path, publish_text

MARKER_NAME = ".pixloom-synth.json"
DRAWING_VERSION = 1

WIDTH, HEIGHT = 480, 288
CHUNK = 50

BACKGROUND = (255, 255, 255)
CARD = (238, 240, 243)
TITLE = (38, 42, 48)
TEXT = (92, 98, 106)
HEADER_COLOURS = {"btn-inactive": (52, 56, 62), "btn-active": (45, 116, 218)}
HEADER_LABELS = {"btn-inactive": (150, 158, 168), "btn-active": (255, 255, 255)}
BUTTON_COLOURS = {
    "btn-green": (64, 168, 84),
    "btn-orange": (245, 158, 32),
    "btn-red": (214, 54, 48),
}
CARDS_PER_ROW = {"single": 1, "double": 2, "quadruple": 4}

SYLLABLES = "ba be co da di el fa go ha in jo ka li ma mo na ol pe qui ra so ta un ve wo xi yo za"


@dataclass(frozen=True)
class Program:
    """One screen: the header's buttons, and for each row its kind and its cards' buttons."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]

    def to_gui(self) -> str:
        lines = ["header {", ", ".join(self.header), "}"]
        for kind, buttons in self.rows:
            lines.append("row {")
            for button in buttons:
                lines += [f"{kind} {{", f"small-title, text, {button}", "}"]
            lines.append("}")
        return "\n".join(lines) + "\n"


def draw_program(rng: random.Random) -> Program:
    """A random program: 1 to 4 header buttons with one active, 1 to 3 rows."""
    header = ["btn-inactive"] * rng.randint(1, 4)
    header[rng.randrange(len(header))] = "btn-active"
    # Few programs of one row exist: they are drawn less often, so that most programs are distinct.
    num_rows = rng.choices((1, 2, 3), weights=(15, 35, 50))[0]
    rows = []
    for _ in range(num_rows):
        kind = rng.choice(tuple(CARDS_PER_ROW))
        buttons = tuple(rng.choice(tuple(BUTTON_COLOURS)) for _ in range(CARDS_PER_ROW[kind]))
        rows.append((kind, buttons))
    return Program(tuple(header), tuple(rows))


def draw_screen(program: Program, rng: random.Random) -> Image.Image:
    """An RGB picture of `program`, 480x288; the words on it are random and mean nothing."""
    image = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    canvas = ImageDraw.Draw(image)
    left = 12.0
    for button in program.header:
        colours = HEADER_COLOURS[button], HEADER_LABELS[button]
        left = _button(canvas, left, 10, 26, _words(rng, 1, 2), *colours, pad=9) + 8
    top, card_height, gap = 46, 74, 6
    for kind, buttons in program.rows:
        count = CARDS_PER_ROW[kind]
        card_width = (WIDTH - 24 - gap * (count - 1)) / count
        for at, button in enumerate(buttons):
            x0 = 12 + at * (card_width + gap)
            box = (x0, top, x0 + card_width, top + card_height)
            canvas.rounded_rectangle(box, 5, fill=CARD)
            inner = card_width - 20
            _text(canvas, x0 + 10, top + 6, _words(rng, 1, 2), TITLE, 13, inner)
            _text(canvas, x0 + 10, top + 24, _words(rng, 3, 9), TEXT, 10, inner)
            label = _words(rng, 1, 1)
            _button(canvas, x0 + 10, top + 42, 24, label, BUTTON_COLOURS[button], BACKGROUND, 10)
        top += card_height + gap
    return image


def write_sample(folder: Path, seed: int, number: int) -> None:
    """Writes `NUMBER.png` and `NUMBER.gui`, which depend on `seed` and `number` alone."""
    rng = random.Random(f"pixloom synth {DRAWING_VERSION}/{seed}/{number}")
    program = draw_program(rng)
    image_path, code_path = (folder / f"{number:06d}{suffix}" for suffix in (".png", ".gui"))
    if image_path.exists() and code_path.exists():
        return
    # Renamed when complete: a killed run can be continued without looking into its files.
    temporary = folder / f".{number:06d}.{os.getpid()}.pixloom-tmp"
    with explained(str(folder)):
        draw_screen(program, rng).save(temporary, format="PNG", compress_level=3)
        temporary.replace(image_path)
        temporary.write_text(program.to_gui(), encoding="utf-8")
        temporary.replace(code_path)


def write_chunk(task: tuple[str, int, int, int]) -> int:
    folder, seed, start, stop = task
    for number in range(start, stop):
        write_sample(Path(folder), seed, number)
    return stop - start


def synthesize(out: str, samples: int, seed: int, workers: int) -> bool:
    """Writes the dataset into the folder `out`; False when it was there already.

    Raises `UserError` when `out` holds anything else than this dataset, whole or in part.
    """
    folder = local_path(out)
    marker = {"drawing": DRAWING_VERSION, "samples": samples, "seed": seed}
    text = json.dumps(marker) + "\n"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{out}: not a folder; choose another OUT")
    with exclusive(out) as scratch:
        marker_path = folder / MARKER_NAME
        names = {entry.name for entry in folder.iterdir()} - {scratch.name, MARKER_NAME}
        if marker_path.exists():
            found = marker_path.read_text(encoding="utf-8", errors="replace")
            if found != text:
                raise UserError(
                    f"{out}: holds a demo dataset of other parameters ({found.strip()}); "
                    "choose another OUT or delete it"
                )
        elif names:
            raise UserError(f"{out}: not empty, and not written by synth; choose another OUT")
        else:
            publish_text(text, str(marker_path))
        expected = {f"{i:06d}{suffix}" for i in range(samples) for suffix in (".png", ".gui")}
        if expected <= names:
            return False
        tasks = [
            (str(folder), seed, start, min(start + CHUNK, samples))
            for start in range(0, samples, CHUNK)
        ]
        finished = engines.run(write_chunk, tasks, workers)
        for _ in engines.progress(finished, samples, "screens", lambda done: done[1]):
            pass
    return True


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _words(rng: random.Random, fewest: int, most: int) -> str:
    syllables = SYLLABLES.split()
    words = (
        "".join(rng.choice(syllables) for _ in range(rng.randint(2, 4)))
        for _ in range(rng.randint(fewest, most))
    )
    return " ".join(words).capitalize()


def _text(
    canvas: ImageDraw.ImageDraw,
    x: float,
    y: float,
    text: str,
    colour: tuple[int, int, int],
    size: int,
    room: float,
) -> None:
    while canvas.textlength(text, _font(size)) > room:
        text = text.rpartition(" ")[0] if " " in text else text[:-1]
    canvas.text((x, y), text, colour, _font(size))


def _button(
    canvas: ImageDraw.ImageDraw,
    x: float,
    y: float,
    height: int,
    label: str,
    colour: tuple[int, int, int],
    label_colour: tuple[int, int, int],
    pad: int,
) -> float:
    """Draws a button as wide as its label needs; returns its right edge."""
    while (width := canvas.textlength(label, _font(11))) > 76:
        label = label[:-1]
    right = x + width + 2 * pad
    canvas.rounded_rectangle((x, y, right, y + height), 4, fill=colour)
    canvas.text((x + pad, y + height / 2), label, label_colour, _font(11), anchor="lm")
    return right


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="pixloom synth",
        description="Write the built-in demo dataset: drawn web screens (.png) and the programs "
        "that describe them (.gui). A second call with the same parameters finds nothing to do.",
    )
    parser.add_argument("out", metavar="OUT", help="folder to write; new, empty, or synth's own")
    parser.add_argument("--samples", type=int, default=1500, help="screens (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    engines.add_workers_option(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON object as the last line")
    args = parser.parse_args(argv)
    if not 1 <= args.samples <= 1_000_000:
        parser.error("--samples: choose 1 to 1000000")

    def action() -> int:
        start = time.monotonic()
        written = synthesize(args.out, args.samples, args.seed, args.workers)
        duration_s = round(time.monotonic() - start, 3)
        if args.json:
            row = {"out": args.out, "samples": args.samples, "seed": args.seed}
            print(json.dumps({**row, "nothing_to_do": not written, "duration_s": duration_s}))
        elif written:
            print(f"{args.out}: {args.samples} screens in {duration_s:.1f} s")
        else:
            print(f"{args.out}: nothing to do, the {args.samples} screens are there")
        return 0

    return command("synth", action)


if __name__ == "__main__":
    sys.exit(main())
