"""dd2 serve: the endpoint's answers to anything, and the page in a real browser."""

import base64
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dd2.cli import main
from dd2.errors import InputError
from dd2.pipeline import OneStepPipeline
from dd2.serving.studio import Busy, Limits, Stopped, Studio, Who, seed_of
from models import HANG, tiny_teacher
from shipped import NAMES, tiny_package

CHROMIUM = shutil.which("chromium")


@contextmanager
def served(*words: object, cwd: Path, end: signal.Signals = signal.SIGTERM) -> Iterator[str]:
    """The address of a running dd2 serve, which must end by a signal, clean and silent."""
    scratch = cwd / "scratch"
    scratch.mkdir(exist_ok=True)
    environment = {**os.environ, "TMPDIR": str(scratch)}
    command = [sys.executable, "-m", "dd2", "serve", *map(str, words), "--port", "0", "--precision", "float32"]
    process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        said = ""
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", said)):
            line = process.stdout.readline()
            assert line, said
            said += line
        yield found[0]
        process.send_signal(end)
        rest = process.stdout.read()
        assert process.wait(HANG) == 0, rest
        assert rest == "stopped\n"
        assert list(scratch.iterdir()) == []
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def post(address: str, body: bytes | dict, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(
        f"{address}/api/generate", content, {"Content-Type": "application/json", **(headers or {})}, method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=HANG) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        text = error.read().decode()
        return error.code, json.loads(text) if text.startswith("{") else text


def test_the_endpoint(folder, pipe, tmp_path):
    with served(folder, "--api", "--max-images", 5, cwd=tmp_path, end=signal.SIGINT) as address:
        asked = {"labels": ["bee", 2], "seeds": [7, 8], "num_inference_steps": 3, "guidance_scale": 2.0}
        status, answer = post(address, asked)
        assert (status, answer["labels"], answer["seeds"]) == (200, [1, 2], [7, 8])
        images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in answer["images"]]
        expected = pipe([1, 2], [7, 8], num_inference_steps=3, guidance_scale=2.0).images
        for image, own in zip(images, expected, strict=True):
            np.testing.assert_array_equal(image, np.asarray(own))
        for body, code, said in (
            ({"labels": [3]}, 422, "not a class"),
            ({"labels": []}, 422, "labels"),
            ({"labels": ["dog"]}, 422, "dog"),
            ({"labels": [True]}, 422, "labels"),
            ({"labels": [1.5]}, 422, "labels"),
            ({"labels": [0] * 6}, 422, "1 to 5"),
            ({"labels": [0], "seeds": [-1]}, 422, "seeds must be"),
            ({"labels": [0], "seeds": [10**30]}, 422, "seeds must be"),
            ({"labels": [0], "seeds": [1, 2]}, 422, "1 labels, 2 seeds"),
            ({"labels": [0], "num_inference_steps": 0}, 422, "num_inference_steps"),
            ({"labels": [0], "num_inference_steps": 18}, 422, "steps must be"),
            ({"labels": [0], "guidance_scale": 3.0}, 422, "no effect in one step"),
            ({"labels": [0], "more": 1}, 422, "more"),
            (b'{"labels": [NaN]}', 422, "labels"),
            (b'{"labels": [0], "num_inference_steps": 2, "guidance_scale": 1e999}', 422, "guidance_scale"),
            (b"[]", 422, "body"),
            (b"not json", 422, ""),
            (b"", 422, "body"),
            (b"[" * 60_000, (400, 422), ""),
            (b'{"labels": ["' + b"x" * 70_000 + b'"]}', 413, ""),
        ):
            status, answer = post(address, body)
            assert status in (code if isinstance(code, tuple) else (code,)), (
                body[:40] if isinstance(body, bytes) else body,
                answer,
            )
            assert said in str(answer)
            assert "Traceback" not in str(answer)
        assert post(address, asked, {"Host": "evil.example"})[0] == 400  # a page elsewhere with a name for this machine
        with urllib.request.urlopen(f"{address}/api/model") as answer:
            model = json.load(answer)
        assert model["id2label"] == {str(number): name for number, name in enumerate(NAMES)}
        assert (model["max_inference_steps"], model["max_images"], model["image_shape"]) == (17, 5, [1, 16, 16])
        with urllib.request.urlopen(f"{address}/openapi.json") as answer:
            assert "/api/generate" in json.load(answer)["paths"]
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{address}/")


def test_many_at_once_are_told_to_come_back(folder, tmp_path):
    with served(folder, "--api", "--max-waiting", 1, cwd=tmp_path) as address, ThreadPoolExecutor(8) as pool:
        asked = {"labels": [0] * 36, "num_inference_steps": 17}
        found = sorted(status for status, _ in pool.map(lambda _: post(address, asked), range(8)))
        assert set(found) == {200, 503}
        assert found.count(200) >= 2
        assert post(address, {"labels": [0]})[0] == 200


def test_a_client_that_leaves_stops_its_drawing(pipe, tmp_path):
    from dd2.serving.server import free_port, run

    left = threading.Event()

    class Slow(Studio):
        def draw(self, labels, seeds, steps=1, guidance_scale=None, who="generator", stop=None):
            assert stop is not None
            if stop.wait(60):
                left.set()
            raise Stopped

    listening = free_port(0)
    arguments = {"args": (Slow(pipe, "ants"), listening, tmp_path), "kwargs": {"page": False}}
    threading.Thread(target=run, **arguments, daemon=True).start()
    with socket.create_connection(listening.getsockname()) as client:
        body = b'{"labels": [0]}'
        head = ["POST /api/generate HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
        client.sendall("\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body)
        time.sleep(0.5)
    assert left.wait(20)


def test_classes_that_are_called_by_numbers(tmp_path):
    """The menu means the class that it names; a typed number is that of a label, as everywhere."""
    from dd2.serving.page import _class

    tiny_package(tmp_path / "q", tiny_teacher(), names=("1", "2", "3"))
    studio = Studio(OneStepPipeline.from_pretrained(tmp_path / "q", device="cpu"), "q")
    assert [_class(studio, value) for value in (0, 2, "0", "1")] == [0, 2, 0, 1]
    for wrong in (3, -1, True, None, "4", [1]):
        with pytest.raises(InputError):
            _class(studio, wrong)


def test_a_client_that_leaves_frees_the_place(folder, tmp_path):
    with served(folder, "--api", "--max-images", 256, "--max-waiting", 0, cwd=tmp_path) as address:
        body = json.dumps({"labels": [0] * 256, "num_inference_steps": 17}).encode()
        port = int(address.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port)) as client:
            head = ["POST /api/generate HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
            client.sendall("\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body)
            time.sleep(0.5)
        for _ in range(100):
            if post(address, {"labels": [0]})[0] == 200:
                break
            time.sleep(0.1)
        else:
            pytest.fail("the place was never freed")


def test_one_at_a_time_and_stopped_on_request(pipe):
    studio = Studio(pipe, "ants", Limits(images=16, waiting=0))
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        studio.draw([0] * 16, range(16), stop=stop)
    with studio._in_turn(None), pytest.raises(Busy):
        studio.draw([0], [0])
    assert studio.draw([0], [0]).labels == [0]
    with pytest.raises(InputError, match="1 to 16"):
        studio.draw([0] * 17, range(17))
    for frames in (1, 33):
        with pytest.raises(InputError, match="frames"):
            studio.walk(0, 1, frames, 0)


def test_the_command_that_it_gives_makes_the_same_file(folder, pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    studio = Studio(pipe, folder)
    cases: list[tuple[Who, int, float | None]] = [("generator", 1, None), ("generator", 4, 2.5), ("teacher", 1, 3.0)]
    for who, steps, guidance in cases:
        drawn = studio.draw(["bee"] * 11, range(5, 16), steps, guidance, who)
        words = studio.command("bee", 5, 11, steps, guidance, who).split()
        assert main(words[1:]) == 0
        assert Path(f"{who}.png").read_bytes() == drawn.grid()


@pytest.mark.parametrize("text", ["1e30", "NaN", "", "-1", "x" * 10_000, "9" * 5000, None, [1], "4611686018427387904"])
def test_what_is_no_seed(text):
    with pytest.raises(InputError, match="seed must be"):
        seed_of(text)
    assert seed_of(" 12 ") == 12


def test_bad_input(folder, tmp_path, capsys, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for words, said in (
            (["--port", "70000"], "port must be"),
            (["--max-images", "0"], "max_images"),
            (["--port", port], "choose another --port"),
        ):
            assert main(["serve", str(folder), "--api", *words]) == 2
            assert said in capsys.readouterr().err
    assert main(["serve", str(tmp_path / "none"), "--api", "--port", "0"]) == 2
    assert "does not exist" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["serve", str(folder)]) == 2
    assert 'pip install "dd2[demo]"' in capsys.readouterr().err


@pytest.fixture
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        nobody_else = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", nobody_else])
        yield opened
        opened.close()


@pytest.mark.e2e
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_page(folder, browser, tmp_path, monkeypatch):
    """It opens, draws, refuses bad input in one line, survives a closed tab, asks nobody else, and its console is empty."""
    with served(folder, "--max-waiting", 0, cwd=tmp_path) as address:
        said: list[str] = []
        asked: set[str] = set()
        page = browser.new_page(viewport={"width": 1100, "height": 1000})
        page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        page.on("request", lambda request: asked.add(re.sub(r"(//[^/]+).*", r"\1", request.url)))
        page.goto(address)
        page.get_by_label("Class").first.click()
        page.get_by_role("option", name="bee").click()
        page.get_by_role("button", name="Draw").click()
        page.locator("#teacher-time").get_by_text("times the generator's").wait_for(timeout=60_000)
        assert " s for 9 images" in page.locator("#generator-time").inner_text()
        with page.expect_download() as got:
            page.get_by_role("button", name="Download PNG").or_(page.get_by_role("link", name="Download PNG")).first.click()
        command = page.locator("#generator-command textarea").input_value()
        monkeypatch.chdir(tmp_path)
        assert main(command.split()[1:]) == 0
        assert Path("generator.png").read_bytes() == Path(got.value.path()).read_bytes()
        page.get_by_label("Seed of the first image").fill("<b>abc</b>")
        page.get_by_role("button", name="Draw").click()
        page.get_by_text("seed must be a whole number").wait_for()
        page.get_by_role("tab", name="Walk").click()
        page.get_by_role("button", name="Walk").click()
        page.get_by_alt_text("Frames between the two seeds").wait_for()
        leaving = browser.new_page()
        leaving.goto(address)
        leaving.get_by_role("button", name="Draw").click()
        leaving.close()
        phone = browser.new_page(viewport={"width": 400, "height": 800}, color_scheme="dark")
        phone.goto(address)
        phone.get_by_role("button", name="Draw").click()
        phone.locator("#teacher-time").get_by_text("times the generator's").wait_for(timeout=60_000)
        assert phone.evaluate("document.documentElement.scrollWidth") <= 400
        assert said == []
        assert {place.removeprefix("http:").removeprefix("blob:http:") for place in asked} <= {
            address.removeprefix("http:"),
            f"blob:{address}",
        }
