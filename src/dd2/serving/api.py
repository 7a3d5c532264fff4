"""The JSON endpoint: POST /api/generate, GET /api/model; /openapi.json describes it."""

import asyncio
import base64
import threading
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from dd2 import __version__
from dd2.errors import InputError
from dd2.images import picture, png
from dd2.precision import name_of
from dd2.seeding import seeds_of
from dd2.serving.studio import Busy, Stopped, Studio

BODY = 64 * 1024
"""Bytes of a request, at most."""

HOSTS = ["127.0.0.1", "localhost"]
"""Names that a browser may call this machine by: pages of others' that got a name for 127.0.0.1 are refused."""


class Wanted(BaseModel):
    """What POST /api/generate takes."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    labels: list[int | str] = Field(
        min_length=1, max_length=256, description="Classes by number or name, or prompts, one per image."
    )
    seeds: list[int] | None = Field(None, max_length=256, description="One per image; 0, 1, … by default.")
    num_inference_steps: int = Field(1, ge=1, le=10_000, description="1: one pass. k: the teacher redraws the last k - 1 steps.")
    guidance_scale: float | None = Field(None, ge=0, le=100, description="Of the teacher, in more than one step.")


class Given(BaseModel):
    """What it answers."""

    images: list[str] = Field(description="PNG files, base64.")
    labels: list[int | str]
    seeds: list[int]
    seconds: float = Field(description="Drawing and decoding.")


def build_api(studio: Studio) -> FastAPI:
    """The application; nobody but this machine is answered."""
    app = FastAPI(title="dd2", version=__version__, docs_url=None, redoc_url=None)  # their pages load from elsewhere
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=BODY)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)

    @app.get("/api/model")
    def model() -> dict[str, Any]:
        """What is served."""
        pipeline = studio.pipeline
        return {
            "name": studio.name,
            "text_to_image": pipeline.by_text,
            "id2label": {str(number): label for number, label in pipeline.id2label.items()},
            "image_shape": list(pipeline.generator.tokenizer.image_shape),
            "max_inference_steps": studio.steps,
            "max_images": studio.limits.images,
            "dtype": name_of(pipeline.dtype),
        }

    @app.post("/api/generate", response_model=Given, responses={422: {}, 503: {}})
    async def generate(wanted: Wanted, request: Request) -> Any:
        """Draw one image per label."""
        seeds = seeds_of(wanted.seeds, None, len(wanted.labels))
        stop = threading.Event()
        asked = (wanted.labels, seeds, wanted.num_inference_steps, wanted.guidance_scale, "generator", stop)
        drawing = asyncio.ensure_future(run_in_threadpool(studio.draw, *asked))
        while not drawing.done():
            await asyncio.wait([drawing], timeout=0.2)
            if not drawing.done() and await request.is_disconnected():
                stop.set()
        drawn = drawing.result()
        files = [base64.b64encode(png(picture(levels))).decode() for levels in drawn.levels]
        return Given(images=files, labels=drawn.labels, seeds=drawn.seeds, seconds=drawn.seconds)

    @app.exception_handler(InputError)
    async def refused(_: Request, error: InputError) -> JSONResponse:
        return _error(422, str(error))

    @app.exception_handler(Busy)
    async def busy(_: Request, error: Busy) -> JSONResponse:
        return _error(503, str(error), {"Retry-After": "1"})

    @app.exception_handler(Stopped)
    async def stopped(_: Request, error: Stopped) -> JSONResponse:
        return _error(499, "the client left")

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        # FastAPI's own answer repeats what was sent, which may be no JSON (NaN).
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return _error(422, f"{where or 'the body'}: {first['msg']}")

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, str(error.detail))

    return app


def _error(status: int, text: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": text}, status, headers)
