"""dd2 serve: a page in the browser, or a JSON endpoint, for one generator."""

import contextlib
import os
import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path

from dd2.config import RunFolder
from dd2.errors import InputError
from dd2.pipeline import OneStepPipeline
from dd2.precision import Precision
from dd2.processes import answering, say


@dataclass(frozen=True)
class ServeConfig:
    """Show a generator beside its teacher in the browser: dd2 serve runs/demo, then http://127.0.0.1:7860.

    The page (extra demo) draws both at the same classes and seeds, with their times; has sliders for images and steps, a walk
    between two seeds, and gives the PNG and the command that makes it. POST /api/generate takes and gives JSON. Only this machine
    is answered; to reach it from another, use ssh -L 7860:127.0.0.1:7860.
    """

    run: RunFolder
    """Run folder of dd2 distill or dd2 demo; a generator folder (no teacher beside it); or owner/name on the Hub."""
    port: int = 7860
    """At 127.0.0.1; 0 takes a free one."""
    api: bool = False
    """The JSON endpoint alone, without the page (extra api)."""
    max_images: int = 36
    """Of a request."""
    max_waiting: int = 4
    """Requests that may wait while one is drawn; the next ones are told to come back."""
    rounds: int = 0
    """Of a generator trained in several rounds (networks.rounds), how many a pass has: fewer are faster; 0: as trained."""
    text_encoder: str = ""
    """Where the text encoder lies on this machine, if not where the model says."""
    trust: tuple[str, ...] = ()
    """Modules of yours that the run may import, because its teacher was module:function."""
    precision: Precision = "auto"
    """As dd2 sample."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        """Refuse ports and limits without meaning."""
        if not 0 <= self.port < 65536:
            raise InputError(f"port must be in 0 to 65535, got {self.port}")
        if not 1 <= self.max_images <= 256 or not 0 <= self.max_waiting <= 100:
            raise InputError(
                f"max_images must be 1 to 256 and max_waiting 0 to 100, got {self.max_images} and {self.max_waiting}"
            )


def serve(config: ServeConfig) -> None:
    """Serve until Ctrl-C.

    Raises:
        InputError: an extra is missing, the port is taken, or there is nothing to serve.
    """
    with tempfile.TemporaryDirectory(prefix="dd2-serve-") as scratch, answering([signal.SIGTERM], _stop):
        # Read when gradio and the Hub's library are imported, and before anything is drawn: no page calls anybody but us.
        os.environ.update(GRADIO_TEMP_DIR=f"{scratch}/gradio", GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
        server = _server(api=config.api)
        from dd2.serving.studio import Limits, Studio

        listening = server.free_port(config.port)
        with listening:
            pipeline = OneStepPipeline.from_pretrained(
                config.run,
                device=config.device,
                dtype=config.precision,
                text_encoder=config.text_encoder,
                trust=config.trust,
                rounds=config.rounds,
            )
            studio = Studio(pipeline, config.run, Limits(config.max_images, config.max_waiting), config.trust)
            studio.warm_up()
            port = listening.getsockname()[1]
            what = "POST http://127.0.0.1:{}/api/generate, described by /openapi.json" if config.api else "http://127.0.0.1:{}"
            say(f"serving {config.run} at {what.format(port)} (Ctrl-C ends it)")
            with contextlib.suppress(KeyboardInterrupt):
                server.run(studio, listening, Path(scratch), page=not config.api)
            say("stopped")


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _server(*, api: bool):
    """The module that serves, whose libraries are extras."""
    try:
        if not api:
            import gradio  # noqa: F401
        from dd2.serving import server
    except ImportError as error:
        extra = "api" if api else "demo"
        raise InputError(f'dd2 serve{" --api" if api else ""} needs {error.name}: pip install "dd2[{extra}]"') from error
    return server
