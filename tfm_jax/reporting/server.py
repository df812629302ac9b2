"""Serve the page of a run to browsers on this machine, and build it again when the files of the run change."""

import contextlib
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

from tfm_jax.errors import InputError, describe
from tfm_jax.reporting.page import BLOCKS, Block, build_block, render, version

ADDRESS = "127.0.0.1"
"""Only programs on this machine can connect: prompts and samples may be private, and the server knows no passwords."""

BLOCK_PATHS = {f"/{name}.json": name for name in BLOCKS}


class LivePage:
    """The newest blocks of a page; a block is only built again after its files have changed."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._blocks: dict[str, Block] = {}
        self._lock = threading.Lock()  # several browsers may ask at the same time

    def block(self, name: str) -> Block:
        """Return a block of the present files.

        Raises:
            InputError: see `write_report`.
        """
        with self._lock:
            if name not in self._blocks or self._blocks[name].version != version(self._folder, name):
                self._blocks[name] = build_block(self._folder, name)
            return self._blocks[name]

    def html(self) -> str:
        return render({name: self.block(name) for name in BLOCKS}, live=True)


def make_server(folder: Path, port: int) -> ThreadingHTTPServer:
    """Return a server of the page of a run, which the caller starts with `serve_forever`.

    `/` is the page, `/curves.json` and `/samples.json` are its blocks; there is nothing else.

    Args:
        port: 0 for any free port.

    Raises:
        InputError: the port is in use or not allowed.
    """
    page = LivePage(folder)

    class Handler(_Handler):
        live_page = page

    try:
        return ThreadingHTTPServer((ADDRESS, port), Handler)
    except OSError as error:
        raise InputError(f"--serve={port}: {error.strerror}; expected a free port") from None


class _Reply(NamedTuple):
    """An answer to a browser."""

    code: HTTPStatus
    kind: str
    text: str
    version: str = ""


class _Handler(BaseHTTPRequestHandler):
    live_page: LivePage

    def do_GET(self) -> None:
        with contextlib.suppress(ConnectionError):  # the browser has closed the page
            self._send(self._reply())

    def _reply(self) -> _Reply:
        port = self.connection.getsockname()[1]
        if self.headers.get("Host") not in (f"{ADDRESS}:{port}", f"localhost:{port}"):
            # A website could give its own name this address, so that its scripts may read the page.
            return _Reply(HTTPStatus.FORBIDDEN, "text/plain", f"this server is only known as {ADDRESS}:{port}")
        try:
            if self.path == "/":
                return _Reply(HTTPStatus.OK, "text/html", self.live_page.html())
            if self.path in BLOCK_PATHS:
                block = self.live_page.block(BLOCK_PATHS[self.path])
                return _Reply(HTTPStatus.OK, "application/json", block.text, block.version)
        except (InputError, OSError) as error:
            message, _ = describe(error) or (str(error), 0)
            return _Reply(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", message)
        return _Reply(HTTPStatus.NOT_FOUND, "text/plain", "there is no such page")

    def _send(self, reply: _Reply) -> None:
        """Send a reply; a browser that has this version already gets code 304 and no content."""
        tag = f'"{reply.version}"'
        if reply.version and self.headers.get("If-None-Match") == tag:
            reply = reply._replace(code=HTTPStatus.NOT_MODIFIED, text="")
        content = reply.text.encode()
        self.send_response(reply.code)
        self.send_header("Content-Type", f"{reply.kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-cache")
        if reply.version:
            self.send_header("ETag", tag)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing: the page asks for news every few seconds."""
