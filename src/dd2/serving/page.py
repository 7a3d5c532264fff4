"""The page of dd2 serve: teacher and generator side by side at the same labels and seeds, and a walk between two seeds.

What a visitor gives is parsed here: gradio's own checks write tracebacks to the log.
"""

import html
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.themes import Base

from dd2.errors import InputError
from dd2.precision import name_of
from dd2.serving.studio import FRAMES, PROMPT, Busy, Stopped, Studio, Who, seed_of

CSS = """
.gradio-container { max-width: 1100px !important; }
.pixels img { image-rendering: pixelated; }
"""
THEME = Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])

Updates = Iterator[tuple[Any, ...]]

HIGH = 340
"""Pixels of the pictures, about."""

WIDE = 280
"""Pixels that sliders and pictures need; columns of a phone go below each other."""


class Visitors:
    """The sessions that draw, so that a tab that closes stops its drawing."""

    def __init__(self) -> None:
        self._stops: dict[str, threading.Event] = {}
        self._lock = threading.Lock()

    def drawing(self, work: Callable[..., Updates], after_stop: tuple[Any, ...]) -> Callable[..., Updates]:
        """A handler of an event: bad input is one line on the page, and none in the log."""

        def handle(request: gr.Request, *values: Any) -> Updates:
            stop, session = threading.Event(), request.session_hash or ""
            with self._lock:
                self._stops[session] = stop
            try:
                yield from work(*values, stop=stop)
            except (InputError, Busy) as error:
                raise gr.Error(html.escape(str(error)), print_exception=False, duration=None) from None
            except Stopped:
                yield after_stop
            finally:
                with self._lock:
                    if self._stops.get(session) is stop:
                        del self._stops[session]

        return handle

    def left(self, request: gr.Request) -> None:
        """A tab was closed, or Stop was pressed."""
        with self._lock:
            stop = self._stops.get(request.session_hash or "")
        if stop is not None:
            stop.set()

    def all_left(self) -> None:
        """The server ends."""
        with self._lock:
            for stop in self._stops.values():
                stop.set()


def build_page(studio: Studio, files: Path, visitors: Visitors) -> gr.Blocks:
    """The page.

    Args:
        studio: what draws.
        files: a folder for the pictures that are shown.
        visitors: told by the page who has left.
    """
    names = [(name, number) for number, name in studio.pipeline.id2label.items()]
    said = f"# {html.escape(Path(studio.name).name)}\n"
    if studio.has_teacher:
        same = "prompts" if studio.pipeline.by_text else "classes"
        said += f"One forward pass beside the teacher's {studio.steps - 1}, at the same {same} and seeds."
    else:
        said += "One forward pass an image. The teacher is not in this folder, so there is nothing to compare with."
    with gr.Blocks(title=f"dd2 · {Path(studio.name).name}", analytics_enabled=False, delete_cache=(60, 600)) as page:
        gr.Markdown(said)
        with gr.Tab("Compare"):
            _compare(studio, files, visitors, names)
        with gr.Tab("Walk"):
            _walk(studio, files, visitors, names)
        page.unload(visitors.left)
    page.queue(
        max_size=max(1, studio.limits.waiting),  # gradio counts the one that runs
        default_concurrency_limit=1,
        api_open=False,
    )
    return page


def _compare(studio: Studio, files: Path, visitors: Visitors, names: list[tuple[str, int]]) -> None:
    rows: tuple[Who, ...] = ("generator", "teacher") if studio.has_teacher else ("generator",)

    def draw(seed: Any, label: Any, count: Any, steps: Any, stop: threading.Event) -> Updates:
        first, images, passes = seed_of(seed), _whole("images", count), _whole("steps", steps)
        number = _class(studio, label)
        called = "" if isinstance(number, str) else f"class{number}_"
        seconds: dict[str, float] = {}
        for place, who in enumerate(rows):
            drawn = studio.draw([number] * images, range(first, first + images), passes, who=who, stop=stop)
            seconds[who] = drawn.seconds
            name = f"{who}_{called}seed{first}"
            file, shown_file = _kept(files, f"{name}.png", drawn.grid()), _kept(files, f"{name}_large.png", drawn.enlarged(HIGH))
            shown = f"**{drawn.seconds:.3g} s** for {images} image{'s' if images > 1 else ''}"
            if who == "teacher":
                shown += f", {drawn.seconds / max(seconds['generator'], 1e-9):.1f} times the generator's"
            command = studio.command(number, first, images, passes, who=who)
            update = [shown_file, shown, gr.update(value=file, interactive=True), command]
            yield tuple([gr.skip()] * (4 * place) + update + [gr.skip()] * (4 * (len(rows) - place - 1)))

    with gr.Row():
        seed = gr.Textbox("0", label="Seed of the first image", max_length=20, max_lines=1, min_width=120)
        label = _label(studio, names)
    with gr.Row():
        count = gr.Slider(1, studio.limits.images, value=min(9, studio.limits.images), step=1, label="Images", min_width=WIDE)
        steps = gr.Slider(
            1, max(2, studio.steps), value=1, step=1, label="Steps of the generator", min_width=WIDE, visible=studio.has_teacher
        )
    with gr.Row():
        go, stop = gr.Button("Draw", variant="primary"), gr.Button("Stop")
    outputs = []
    with gr.Row():
        for who in rows:
            with gr.Column(min_width=WIDE):
                gr.Markdown(f"### {who.capitalize()}")
                picture, text = _picture(f"Images by the {who}"), gr.Markdown("", elem_id=f"{who}-time")
                file = gr.DownloadButton("Download PNG", interactive=False)
                line = gr.Textbox(label="The same by", buttons=["copy"], interactive=False, lines=2, elem_id=f"{who}-command")
                outputs += [picture, text, file, line]
    for slider in (count, steps):
        slider.preprocess = lambda payload: payload
    blank = tuple([gr.skip(), "stopped", gr.skip(), gr.skip()] * len(rows))
    handler = visitors.drawing(draw, blank)
    inputs = [seed, label, count, steps]
    go.click(handler, inputs, outputs, api_name="compare", concurrency_id="device", concurrency_limit=1)
    seed.submit(handler, inputs, outputs, api_visibility="private", concurrency_id="device", concurrency_limit=1)
    stop.click(visitors.left, queue=False, api_visibility="private", show_progress="hidden")


def _walk(studio: Studio, files: Path, visitors: Visitors, names: list[tuple[str, int]]) -> None:
    def walk(a: Any, b: Any, label: Any, frames: Any, stop: threading.Event) -> Updates:
        first, second, count = seed_of(a), seed_of(b), _whole("frames", frames)
        number = _class(studio, label)
        called = "" if isinstance(number, str) else f"class{number}_"
        file = _kept(files, f"walk_{called}{first}_{second}.png", studio.walk(first, second, count, number, stop))
        where = f"{studio.name!r}, dtype={name_of(studio.pipeline.dtype)!r}" + (
            f", trust={studio.trust!r}" if studio.trust else ""
        )
        code = f"OneStepPipeline.from_pretrained({where}).interpolate({first}, {second}, {count}, {number!r})"
        yield file, gr.update(value=file, interactive=True), code

    with gr.Row():
        a = gr.Textbox("0", label="From seed", max_length=20, max_lines=1, min_width=120)
        b = gr.Textbox("1", label="To seed", max_length=20, max_lines=1, min_width=120)
        label = _label(studio, names)
        frames = gr.Slider(2, FRAMES, value=8, step=1, label="Frames", min_width=WIDE)
    frames.preprocess = lambda payload: payload
    go = gr.Button("Walk", variant="primary")
    strip = _picture("Frames between the two seeds")
    file = gr.DownloadButton("Download PNG", interactive=False)
    code = gr.Textbox(label="The same in Python", buttons=["copy"], interactive=False)
    handler = visitors.drawing(walk, (gr.skip(), gr.skip(), "stopped"))
    inputs, outputs = [a, b, label, frames], [strip, file, code]
    go.click(handler, inputs, outputs, api_name="walk", concurrency_id="device", concurrency_limit=1)


def _picture(what: str) -> gr.Image:
    return gr.Image(
        show_label=False,
        format="png",
        type="filepath",
        interactive=False,
        buttons=["fullscreen"],
        height=HIGH + 20,
        elem_classes="pixels",
        alt_text=what,
    )


def _label(studio: Studio, names: list[tuple[str, int]]) -> gr.Dropdown | gr.Textbox:
    """Where the class is chosen, or the prompt is typed."""
    if studio.pipeline.by_text:
        return gr.Textbox(str(studio.first_label), label="Prompt", max_length=PROMPT, max_lines=2, min_width=280)
    return gr.Dropdown(names, value=names[0][1], label="Class", allow_custom_value=True, min_width=140)


def _class(studio: Studio, value: Any) -> int | str:
    """The number of a class: the menu's own, or what somebody typed; of a text-conditional model the prompt."""
    if studio.pipeline.by_text:
        return studio.known(str(value))
    if type(value) is int and value in studio.pipeline.id2label:
        return value
    return studio.pipeline.get_label_ids(str(value))[0]


def _whole(name: str, value: Any) -> int:
    """A whole number that a slider, or whoever calls its address, gives."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value not in range(-1, 10**6 + 1):
        raise InputError(f"{name} must be a whole number, got {str(value)[:40]}")
    return int(value)


def _kept(folder: Path, name: str, content: bytes) -> str:
    """A file that gradio copies to its cache; ours need not live longer than a look at it."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*/*.png"):
        if time.time() - old.stat().st_mtime > 600:
            old.unlink(missing_ok=True)
    place = folder / f"{time.time_ns()}"
    place.mkdir()
    (place / name).write_bytes(content)
    return str(place / name)
