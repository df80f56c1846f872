"""`rpp serve` with a small program in SGLang's place. Arguments: its own."""

from __future__ import annotations

import sys
from typing import Any

from megatron_rpp import cli
from megatron_rpp.config.rollout import RolloutConfig
from megatron_rpp.rollout import sglang_server

SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"tp_size": 1, "device": "cpu"}')
http.server.ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), Handler).serve_forever()
"""


def command(model_path: str, rollout: RolloutConfig, dtype: str, device: str, port: int, **more: Any) -> list[str]:
    return [sys.executable, "-c", SERVER, more["host"], str(port)]


if __name__ == "__main__":
    sglang_server.server_command = command
    sys.exit(cli.main(["serve", *sys.argv[1:]]))
