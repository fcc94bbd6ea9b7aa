"""Environments to look at: at the terminal, or as an animated picture.

A frame is what `env.render()` returns: a text, or colours `u8[H, W, 3]`.

    frames = list(play(env, lambda timestep: 0))
    show(frames, rich.console.Console())
    save_gif(frames, Path("episode.gif"))

Gymnasium environments draw colours if made with `render_mode="rgb_array"`. CartPole,
Pendulum and their like need `pip install "gymnasium[classic-control]"` for it.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import dm_env
import matplotlib as mpl
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.color import Color
from rich.console import Console
from rich.live import Live
from rich.style import Style
from rich.text import Text

Frame = Any  # str or u8[H, W, 3]


def play(env: Any, policy: Callable[[dm_env.TimeStep], Any]) -> Iterator[Frame]:
    """Plays one episode, yielding a frame for each timestep, the last one included.

    Raises:
        ValueError: if the environment cannot be drawn.
    """
    timestep = env.reset()
    yield frame(env)
    while not timestep.last():
        timestep = env.step(policy(timestep))
        yield frame(env)


def frame(env: Any) -> Frame:
    """Draws an environment as it stands."""
    drawn = env.render() if hasattr(env, "render") else None
    if isinstance(drawn, str) or (isinstance(drawn, np.ndarray) and drawn.ndim == 3):
        return drawn
    raise ValueError("cannot draw this environment: it gives no text and no picture.")


def show(frames: Iterable[Frame], terminal: Console, seconds: float = 0.1) -> None:
    """Shows frames one after another at the terminal, in one place."""
    with Live(console=terminal, auto_refresh=False) as live:
        for drawn in frames:
            live.update(_as_text(drawn, terminal), refresh=True)
            time.sleep(seconds)


def save_gif(frames: Iterable[Frame], path: Path, seconds: float = 0.1) -> None:
    """Writes frames of one size as an animated GIF, repeated for ever."""
    first, *others = map(_as_picture, frames)
    first.save(
        path,
        format="GIF",
        save_all=True,
        append_images=others,
        duration=round(1000 * seconds),
        loop=0,
    )


def _as_text(drawn: Frame, terminal: Console) -> Text:
    """Colours become rows of half blocks, two pixels in each."""
    if isinstance(drawn, str):
        return Text(drawn)
    height, width, _ = drawn.shape
    scale = min(1, terminal.width / width, 2 * (terminal.height - 1) / height)
    columns, rows = round(scale * width), round(scale * height / 2)
    picture = Image.fromarray(drawn).resize((columns, 2 * rows))
    pixels = np.asarray(picture).reshape(rows, 2, columns, 3).swapaxes(1, 2)
    return Text("\n").join(
        Text.assemble(
            *(
                ("▀", Style.from_color(*(Color.from_rgb(*color) for color in block)))
                for block in row
            )
        )
        for row in pixels.tolist()
    )


def _as_picture(drawn: Frame) -> Image.Image:
    if not isinstance(drawn, str):
        return Image.fromarray(drawn)
    font = ImageFont.truetype(
        Path(mpl.get_data_path(), "fonts", "ttf", "DejaVuSansMono.ttf"), 20
    )
    lines = drawn.split("\n")
    size = 24 * len(max(lines, key=len)), 24 * len(lines)
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    for row, line in enumerate(lines):
        for column, mark in enumerate(line):
            center = 24 * column + 12, 24 * row + 12
            pen.text(center, mark, "black", font, "mm")
    return picture
