"""Serving the page and the endpoint at 127.0.0.1 until a signal ends it."""

import asyncio
import socket
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.routing import Mount

from dd2.errors import InputError
from dd2.serving.api import build_api
from dd2.serving.studio import Studio

HOST = "127.0.0.1"

CONNECTIONS = 64
"""At once; a page that is open holds two."""


class Server(uvicorn.Server):
    """Ends what is open, in place of waiting for it.

    Args:
        config: uvicorn's.
        ending: called when the server ends.
    """

    def __init__(self, config: uvicorn.Config, ending: Any) -> None:
        super().__init__(config)
        self._ending = ending

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Tell open pages first: their streams would be cancelled with a traceback."""
        self._ending()
        await asyncio.sleep(0.1)
        await super().shutdown(sockets)


def free_port(port: int) -> socket.socket:
    """A socket at 127.0.0.1.

    Raises:
        InputError: the port is taken.
    """
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((HOST, port))
        found.listen(CONNECTIONS)  # who comes before the server runs waits a moment
    except OSError as error:
        found.close()
        raise InputError(f"port {port} cannot be used ({error.strerror}); choose another --port") from error
    return found


def with_page(app: FastAPI, studio: Studio, files: Path, port: int) -> Any:
    """Put the page on the application's root; what ends it is returned."""
    import gradio as gr
    from gradio.route_utils import FnIndexInferError
    from gradio.routes import App
    from gradio.server_messages import UnexpectedErrorMessage

    from dd2.serving.page import CSS, THEME, Visitors, build_page

    visitors = Visitors()
    page = build_page(studio, files / "shown", visitors)
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        server_name=HOST,
        server_port=port,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        allowed_paths=[],
        max_file_size="1kb",
        show_error=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=THEME,
        css=CSS,
    )
    mounted = next(route.app for route in app.routes if isinstance(route, Mount) and isinstance(route.app, App))

    async def unknown(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"error": str(error)}, 404)

    mounted.add_exception_handler(FnIndexInferError, unknown)

    def ending() -> None:
        visitors.all_left()
        for messages in list(page._queue.pending_messages_per_session.values()):
            messages.put_nowait(UnexpectedErrorMessage(message="The server has stopped.", success=False))
        page.is_running = False
        mounted.stop_event.set()

    return ending


def run(studio: Studio, listening: socket.socket, files: Path, *, page: bool) -> None:
    """Serve until a signal arrives."""
    app = build_api(studio)
    ending = with_page(app, studio, files, listening.getsockname()[1]) if page else lambda: None
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=3,
    )
    Server(config, ending).run(sockets=[listening])
