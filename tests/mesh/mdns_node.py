"""A process with a `Discovery` and nothing else: `python -m tests.mesh.mdns_node`, and node id,
port, service, interface and listen address.

It prints a JSON line for each event, and ends, saying goodbye, when its standard input does.
"""

from __future__ import annotations

import json
import sys

import trio

from llamesh.config.sections import Discovery as Settings
from llamesh.mesh.discovery import Discovery, Sighting
from llamesh.mesh.interfaces import announceable


def found(sighting: Sighting) -> None:
    say("found", sighting.node_id, [str(address) for address in sighting.addresses])


def say(*words: object) -> None:
    print(json.dumps(words), flush=True)


async def main(node_id: str, port: str, service: str, interface: str, listen: str) -> None:
    discovery = Discovery(
        Settings(service_name=service, interfaces=(interface,)),
        node_id=node_id,
        port=int(port),
        txt={"wire": "1"},
        addresses=lambda: announceable([interface], listen),
        on_found=found,
        on_lost=lambda lost: say("lost", lost),
        look_every=0.2,
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: discovery.run(task_status=task_status))
        await trio.to_thread.run_sync(sys.stdin.read)
        nursery.cancel_scope.cancel()
    say("ended")


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
