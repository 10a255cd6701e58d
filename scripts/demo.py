"""The demo behind `scripts/demo`: a small model, a node, one streamed answer, then the node is yours."""

from __future__ import annotations

import argparse
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parent))
from demo_model import DemoError, fetch_model

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".demo"
MODEL = "smollm2"
QUESTION = "Why is the sky blue? Answer in two sentences."
START_SECONDS = 60
# The node's own grace period ends well before; what is left after this long hangs.
STOP_SECONDS = 45

CONFIG = """\
# Written by scripts/demo at each start. Every key has a default: see config.example.yaml.
listen_addr: 127.0.0.1:{port}
metrics_path: ./node-metrics.json
"""
COOKBOOK = """\
# Written by scripts/demo at each start. For a model of your own, copy this file and name a GGUF file,
# or a repository of the hub to fetch it from:
#
#   - name: qwen
#     profiles:
#       - id: default
#         hf_repo: Qwen/Qwen2.5-1.5B-Instruct-GGUF
#         hf_file: qwen2.5-1.5b-instruct-q4_k_m.gguf
models:
  - name: {model}
    description: SmolLM2 135M Instruct, a very small model that answers in English
    profiles:
      - id: default
        model_path: {path}
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--once", action="store_true", help="end after the answer")
    parser.add_argument("--mesh", action="store_true", help="three nodes, one of which dies on the way")
    parser.add_argument("--ask", default=QUESTION, metavar="TEXT", help="what to ask (default: %(default)s)")
    options = parser.parse_args()
    # A closed terminal and `kill` end the demo as Ctrl-C does: the node is stopped, nothing is left running.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    try:
        model = fetch_model()
        if options.mesh:
            import demo_mesh

            return demo_mesh.main(model, once=options.once)
        with running_node(model) as (process, address):
            ask(address, options.ask)
            if options.once:
                return 0
            return serve(process, address)
    except DemoError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; run it again at any time, a download goes on where it was", file=sys.stderr)
        return 130


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def free_port() -> int:
    """8080, the default, where it is free; else 0: the node takes any and says which."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", 8080))
        except OSError:
            print("port 8080 is taken: the node gets another one")
            return 0
    return 8080


@contextmanager
def running_node(model: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A node with that one model, and its address; stopped when the block is left."""
    FOLDER.mkdir(exist_ok=True)
    config, cookbook, log = FOLDER / "config.yaml", FOLDER / "cookbook.yaml", FOLDER / "node.log"
    config.write_text(CONFIG.format(port=free_port()))
    # A JSON text is a YAML text as well, whatever is in the path.
    cookbook.write_text(COOKBOOK.format(model=MODEL, path=json.dumps(str(model))))
    command = [sys.executable, "-m", "llamesh", "--config", str(config), "--cookbook", str(cookbook)]
    print(f"starting a node (its log: {log.relative_to(ROOT)})")
    with log.open("wb") as output:
        # In a session of its own: Ctrl-C reaches us, and we tell the node once.
        process = subprocess.Popen(
            command,
            cwd=FOLDER,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process, wait_for_address(process, log)
    finally:
        stop(process)


def wait_for_address(process: subprocess.Popen[bytes], log: Path) -> str:
    """The address that the node says it listens on."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        ended = process.poll() is not None
        for line in log.read_bytes().splitlines():
            if (said := _event(line)).get("event") == "listening" and "url" in said:
                return str(said["url"]).rstrip("/")
        if ended:
            raise DemoError(f"the node ended with exit code {process.returncode}.\n{last_words(log)}")
        time.sleep(0.02)
    raise DemoError(f"the node did not start within {START_SECONDS} s.\n{last_words(log)}")


def _event(line: bytes) -> dict[str, Any]:
    try:
        said = json.loads(line)
    except ValueError:  # half a line, or words of the interpreter
        return {}
    return said if isinstance(said, dict) else {}


def last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-10:]
    return "\n".join([f"The end of {log.relative_to(ROOT)}:", *(f"  {line}" for line in lines)])


def ask(address: str, question: str) -> None:
    """Asks, streams the answer to the terminal, and says how fast it came."""
    print(f"asking: {question}\n", flush=True)
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 200,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started = time.monotonic()
    first = last = 0.0
    pieces = counted = 0
    try:
        for chunk in stream(address, body):
            counted = (chunk.get("usage") or {}).get("completion_tokens", counted)
            for choice in chunk.get("choices") or []:
                if text := (choice.get("delta") or {}).get("content"):
                    last = time.monotonic()
                    first = first or last
                    pieces += 1
                    print(text, end="", flush=True)
    except httpx.HTTPError as error:
        raise DemoError(
            f"no answer from {address}: {error or type(error).__name__}\n{last_words(FOLDER / 'node.log')}"
        ) from None
    if not pieces:
        raise DemoError(f"the answer was empty.\n{last_words(FOLDER / 'node.log')}")
    tokens = counted or pieces
    speed = f"{(tokens - 1) / (last - first):.0f} tokens/s" if tokens > 1 and last > first else "one token"
    print(
        f"\n\nfirst token after {first - started:.2f} s, the start of the model included; then {speed}",
        flush=True,
    )


def stream(address: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The chunks of a streamed chat completion."""
    timeout = httpx.Timeout(120, connect=10)
    with (
        httpx.Client(timeout=timeout, trust_env=False) as client,
        client.stream("POST", f"{address}/v1/chat/completions", json=body) as response,
    ):
        if response.status_code != 200:
            raise DemoError(f"{response.status_code}: {_message(response.read())}")
        done = False
        for line in response.iter_lines():
            if not line.startswith("data:"):
                continue  # comments say what a stream waits for
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                done = True
                continue
            chunk = _event(data.encode())
            if "error" in chunk:
                raise DemoError(_message(data.encode()))
            yield chunk
        if not done:
            raise DemoError(f"the answer was cut off.\n{last_words(FOLDER / 'node.log')}")


def _message(body: bytes) -> str:
    error = _event(body).get("error")
    if isinstance(error, dict) and "message" in error:
        return str(error["message"])
    return body.decode(errors="replace").strip()


def show_ways(address: str) -> None:
    print(
        f"""
The node serves at {address} until Ctrl-C. Three ways to use it:

  curl     curl {address}/v1/chat/completions -H 'content-type: application/json' \\
             -d '{{"model": "{MODEL}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'

  Python   from openai import OpenAI
           client = OpenAI(base_url="{address}/v1", api_key="unused")
           answer = client.chat.completions.create(
               model="{MODEL}", messages=[{{"role": "user", "content": "Hello!"}}])
           print(answer.choices[0].message.content)

  Browser  {address}/ui/
""",
        flush=True,
    )


def serve(process: subprocess.Popen[bytes], address: str) -> int:
    """Waits for Ctrl-C. The node is stopped by whoever started it."""
    try:
        show_ways(address)
        code = process.wait()
    except KeyboardInterrupt:
        return 0
    raise DemoError(f"the node ended by itself with exit code {code}.\n{last_words(FOLDER / 'node.log')}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """Asks the node to end; a second Ctrl-C asks it to hurry. Nothing is left when this returns."""
    if process.poll() is not None:
        return
    print("\nstopping the node", file=sys.stderr)
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
        return
    except subprocess.TimeoutExpired:
        print(f"it did not stop within {STOP_SECONDS} s", file=sys.stderr)
    except KeyboardInterrupt:
        process.terminate()
        try:
            process.wait(5)
            return
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            pass
    process.kill()
    process.wait()


if __name__ == "__main__":
    # demo_mesh uses the functions of this module, and must get this one, not a second copy of it.
    sys.modules["demo"] = sys.modules["__main__"]
    sys.exit(main())
