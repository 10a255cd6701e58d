#!/usr/bin/env python3
"""What the fake llama.cpp project builds: an engine that passes a build's tests, or fails them as told.

    fake_built_server.py BEHAVIOUR.json [llama-server's arguments]

With the tiny model of `llamesh.local.builds` it is a small server with `/health` and `/completion`; with a
behaviour file of the fake llama-server in the place of a model it is that server. The behaviour file of the
build itself (written when it was committed) may say:

    version TEXT          what `--version` prints
    smoke "exit"          ends when it loads the tiny model       smoke "silent"   generates nothing
    mixes "cache"         mixes up conversations unless it has `--cache-ram 0`    mixes "always"
    serves false          ends with exit code 3 when it is given any other model

Only the standard library.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

HELP = """----- common params -----
-c,    --ctx-size N                     size of the prompt context
-cram, --cache-ram N                    the maximum cache size in MiB
-a,    --alias STRING                   the name
--host HOST                             where to listen
--port PORT                             where to listen
"""


def value_of(arguments: list[str], flag: str) -> str:
    """The value of the last such flag, "" without one."""
    found = ""
    for index, word in enumerate(arguments[:-1]):
        if word == flag:
            found = arguments[index + 1]
    return found


class Handler(BaseHTTPRequestHandler):
    """Two routes."""

    protocol_version = "HTTP/1.1"
    behaviour: ClassVar[dict[str, Any]] = {}
    mixes = False
    asked = 0

    def do_GET(self) -> None:
        """Health."""
        self.reply({"status": "ok"})

    def do_POST(self) -> None:
        """A completion: the same letters for the same prompt."""
        question = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.headers["authorization"] != f"Bearer {os.environ['LLAMA_API_KEY']}":
            self.send_error(401)
            return
        prompt = question["prompt"]
        Handler.asked += 1
        if self.mixes and question["cache_prompt"] and Handler.asked % 3 == 0:
            prompt += "what another one said"
        letters = (
            "" if self.behaviour.get("smoke") == "silent" else hashlib.sha256(prompt.encode()).hexdigest()
        )
        self.reply({"content": letters[: question["n_predict"]]})

    def reply(self, document: Any) -> None:
        """JSON."""
        body = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        """Not a word."""


def main(behaviour_file: str, arguments: list[str]) -> None:
    """The command."""
    behaviour = json.loads(Path(behaviour_file).read_text())
    if "--version" in arguments:
        print(f"version: {behaviour['version']}", flush=True)
        return
    if "--help" in arguments:
        print(HELP, flush=True)
        return
    model = Path(value_of(arguments, "-m"))
    with model.open("rb") as file:
        is_gguf = file.read(4) == b"GGUF"
    if not is_gguf:
        if behaviour.get("serves") is False:
            print("error: unknown model architecture: 'anything'", flush=True)
            raise SystemExit(3)
        sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
        from tests.support.fake_llama_server import main as serve

        serve(arguments)
        return
    if behaviour.get("smoke") == "exit":
        print("error: illegal instruction, said the processor", flush=True)
        raise SystemExit(4)
    Handler.behaviour = behaviour
    mixes = behaviour.get("mixes")
    Handler.mixes = mixes == "always" or (mixes == "cache" and value_of(arguments, "--cache-ram") != "0")
    ThreadingHTTPServer(("127.0.0.1", int(value_of(arguments, "--port"))), Handler).serve_forever()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
