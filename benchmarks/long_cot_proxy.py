"""Stands between trainer and SGLang server and makes every response as long as a recorded one; all else passes."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import zlib
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import aiohttp
from aiohttp import web

from benchmarks.long_cot_lengths import Lengths

_HOP_HEADERS = {"transfer-encoding", "content-length", "connection", "host", "content-encoding"}


class LengthProxy:
    """A context manager; `url` is where the trainer finds the server. It runs in a thread of its own."""

    def __init__(self, server_url: str, lengths: Lengths) -> None:
        self.url = ""
        self.starts: list[float] = []  # monotonic seconds of each request for responses
        self._server_url, self._lengths = server_url.rstrip("/"), lengths
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> LengthProxy:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _open(self) -> None:
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self._session = aiohttp.ClientSession(
            connector=connector, timeout=aiohttp.ClientTimeout(total=None), auto_decompress=False
        )
        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", "/{path:.*}", self._forward)
        # A request that the trainer lets go of must end at the server too.
        self._runner = web.AppRunner(app, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _close(self) -> None:
        await self._runner.cleanup()
        await self._session.close()

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        if request.path == "/generate":
            self.starts.append(time.monotonic())
            body = json.dumps(with_lengths(json.loads(body), self._lengths)).encode()
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP_HEADERS}
        url = self._server_url + request.path_qs
        async with self._session.request(request.method, url, data=body, headers=headers) as reply:
            kept = {name: value for name, value in reply.headers.items() if name.lower() not in _HOP_HEADERS}
            if encoding := reply.headers.get("content-encoding"):
                kept["content-encoding"] = encoding
            return web.Response(status=reply.status, body=await reply.read(), headers=kept)


def with_lengths(payload: dict[str, Any], lengths: Lengths) -> dict[str, Any]:
    """The body of `/generate` where each sample goes on to its recorded length, whatever token it draws."""
    ids, params = payload["input_ids"], payload["sampling_params"]
    if isinstance(params, dict):
        return {**payload, "sampling_params": _forced(params, length_of(ids, params["sampling_seed"], lengths))}
    forced = [_forced(p, length_of(i, p["sampling_seed"], lengths)) for i, p in zip(ids, params, strict=True)]
    return {**payload, "sampling_params": forced}


def length_of(prompt_ids: Sequence[int], seed: int, lengths: Lengths) -> int:
    """The prompt decides the recorded prompt, the sample's seed which of its responses; the same in every mode."""
    group = lengths.groups[zlib.crc32(json.dumps(list(prompt_ids)).encode()) % len(lengths.groups)]
    return group[zlib.crc32(str(seed).encode()) % len(group)]


def _forced(params: dict[str, Any], tokens: int) -> dict[str, Any]:
    return {**params, "max_new_tokens": tokens, "ignore_eos": True}
