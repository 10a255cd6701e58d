"""What is in deploy/ and can't be run everywhere: read, checked against the program, and linted."""

from __future__ import annotations

import os
import plistlib
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from ruamel.yaml import YAML

from llamesh.config.check import load_files
from llamesh.config.settings import Settings, load_settings
from tests.deploy.conftest import script
from tests.end_to_end.cookbooks import (
    CHAT,
    ask,
    chat,
    cookbook,
    error_of,
    profile,
    wait_document,
    wait_running,
)
from tests.support.fake import FAKE_LLAMA_SERVER, fake_profile_file
from tests.support.node import CHECKOUT, clean_environment, running_node

DEPLOY = CHECKOUT / "deploy"
GRACE_SECONDS = Settings().shutdown_grace_period_seconds
# node.py: answers on their way and the ends of children, after the grace.
LAST_SECONDS = 15
KUBERNETES = "1.31"

SHELL = [
    DEPLOY / "install.sh",
    *sorted((DEPLOY / "debian").glob("p*")),
    CHECKOUT / "scripts/build_deb",
    CHECKOUT / "scripts/make_clean_root",
    CHECKOUT / "scripts/lint_tools",
]


def documents(*paths: Path) -> Iterator[dict[str, Any]]:
    for path in paths:
        yield from YAML(typ="safe").load_all(path.read_text())


def unit(name: str) -> dict[str, list[str]]:
    """Key -> values, of all sections."""
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / "systemd" / name).read_text().splitlines():
        if line and line[0] not in "#[":
            key, value = line.split("=", 1)
            found.setdefault(key, []).append(value)
    return found


def settings_of(environment: dict[str, str], config: Path | None = None) -> Settings:
    """The settings that a node takes from such an environment; a mistake in it raises."""
    none = Path("/nonexistent/file.yaml")
    return load_settings(config or none, none, environment, required=False, secrets_required=False)


@pytest.fixture(scope="session")
def tools() -> Path:
    return Path(script("scripts/lint_tools"))


def lint(*words: str | Path) -> None:
    done = subprocess.run(
        [str(word) for word in words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout


# systemd


def test_the_service_hides_no_gpu_and_ends_its_children_itself() -> None:
    service = unit("llamesh.service")
    # Each of these makes the kernel's device filter a closed list, which GPUs aren't on.
    assert not {"PrivateDevices", "DevicePolicy", "DeviceAllow", "ProtectClock"} & set(service)
    assert not {"MemoryDenyWriteExecute", "PrivateUsers", "ProtectProc", "ProcSubset"} & set(service)
    assert service["KillMode"] == ["mixed"]
    assert service["OOMPolicy"] == ["continue"]
    assert service["Type"] == ["notify"]
    assert int(service["TimeoutStopSec"][0]) >= GRACE_SECONDS + 2 * LAST_SECONDS
    families = set(service["RestrictAddressFamilies"][0].split())
    assert families == {"AF_UNIX", "AF_INET", "AF_INET6", "AF_NETLINK"}


def test_the_sockets_are_what_a_node_takes() -> None:
    for name, label in (("llamesh.socket", "api"), ("llamesh-peers.socket", "peers")):
        socket = unit(name)
        assert socket["FileDescriptorName"] == [label]
        assert socket["BindIPv6Only"] == ["ipv6-only"]
        assert "Accept" not in socket
    listening = settings_of({}, DEPLOY / "etc/config.yaml").listen_addr
    assert unit("llamesh.socket")["ListenStream"] == [str(listening)]


def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("not installed: systemd-analyze")
    names = [path.name for path in sorted((DEPLOY / "systemd").iterdir())]
    for name in names:
        text = (DEPLOY / "systemd" / name).read_text()
        (tmp_path / name).write_text(text.replace("/opt/llamesh/bin/python", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(str(tmp_path / name) for name in names)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    # Of units that this machine has of its own it may have more to say.
    ours = [line for line in (done.stdout + done.stderr).splitlines() if "llamesh" in line]
    assert ours == []


# launchd


def test_the_launch_agent() -> None:
    plist = plistlib.loads((DEPLOY / "launchd/org.llamesh.node.plist").read_bytes())
    assert plist["Label"] == "org.llamesh.node"
    assert plist["ProgramArguments"][:6] == [
        "@PREFIX@/bin/python",
        "-I",
        "-X",
        "faulthandler",
        "-m",
        "llamesh",
    ]
    assert plist["ExitTimeOut"] >= GRACE_SECONDS + 2 * LAST_SECONDS
    assert plist["KeepAlive"] == {"SuccessfulExit": False}
    assert plist["Umask"] == 0o027
    text = (DEPLOY / "launchd/org.llamesh.node.plist").read_text()
    installer = (DEPLOY / "install.sh").read_text()
    placeholders = set(re.findall("@[A-Z]+@", text))
    assert placeholders == {"@PREFIX@", "@CONFIG@", "@STATE@", "@LOGS@"}
    assert all(f"s#{name}#" in installer for name in placeholders)


# Files and scripts


def test_the_files_that_are_installed_are_good() -> None:
    etc = DEPLOY / "etc"
    settings, book = load_files(
        etc / "config.yaml",
        etc / "cookbook.yaml",
        etc / "secrets.yaml",
        {},
        config_required=True,
        secrets_required=True,
    )
    assert settings == Settings()
    assert book.profiles == ()


def test_shellcheck_finds_nothing() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("not installed: shellcheck")
    lint("shellcheck", "-x", "-P", CHECKOUT, *SHELL)


def test_scripts_are_executable_and_fetch_no_scripts() -> None:
    for path in SHELL:
        assert os.access(path, os.X_OK), path
        assert not re.search(r"\b(curl|wget)\b", path.read_text()), path


# Containers


def stages(text: str) -> dict[str, list[tuple[str, str]]]:
    """Stage -> instructions, each a word and the rest."""
    found: dict[str, list[tuple[str, str]]] = {}
    joined = re.sub(r"\\\n", " ", "\n".join(line for line in text.splitlines() if not line.startswith("#")))
    for line in filter(None, map(str.strip, joined.splitlines())):
        word, rest = line.split(None, 1)
        if word == "FROM":
            here = found.setdefault(rest.split(" AS ")[1], [])
        elif found:
            here.append((word, " ".join(rest.split())))
    return found


@pytest.fixture(scope="module")
def dockerfile() -> dict[str, list[tuple[str, str]]]:
    return stages((DEPLOY / "docker/Dockerfile").read_text())


@pytest.mark.parametrize("stage", ["cpu", "cuda"])
def test_an_image_runs_as_nobody_special(dockerfile: Any, stage: str) -> None:
    last = dict(dockerfile[stage])
    assert last["USER"] == "10001"
    assert last["STOPSIGNAL"] == "SIGTERM"
    assert last["ENTRYPOINT"].startswith('["/usr/bin/tini", "--", "/opt/llamesh/bin/python"')
    assert "/healthz" in last["HEALTHCHECK"]
    assert "ADD" not in last
    assert not re.search("curl|wget", str(dockerfile[stage]))


def test_both_images_differ_in_the_engine_alone(dockerfile: Any) -> None:
    cpu, cuda = dockerfile["cpu"], dockerfile["cuda"]
    more = [entry for entry in cuda if entry not in cpu]
    assert [word for word, _ in more] == ["COPY", "ENV"]
    assert "llama-server" in more[0][1]
    assert [word for word, _ in cpu if word == "ENV"] == ["ENV"]


def test_what_the_dockerfile_copies_is_there_and_sent(dockerfile: Any) -> None:
    allowed = (DEPLOY / "docker/Dockerfile.dockerignore").read_text().splitlines()
    for word, rest in [entry for stage in dockerfile.values() for entry in stage]:
        if word == "COPY" and "--from" not in rest:
            for name in [part for part in rest.split()[:-1] if not part.startswith("--")]:
                assert (CHECKOUT / name).exists(), name
                assert f"!{name.rstrip('/')}" in allowed


def test_hadolint_finds_nothing(tools: Path) -> None:
    lint(tools / "hadolint", DEPLOY / "docker/Dockerfile")


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    [document] = documents(DEPLOY / "docker/compose.yaml")
    return document


def test_the_composed_nodes_know_each_other(compose: dict[str, Any]) -> None:
    services = compose["services"]
    nodes = {name: service for name, service in services.items() if name.startswith("node-")}
    assert len(nodes) == 2
    for name, node in nodes.items():
        environment = {key: str(value) for key, value in node["environment"].items()}
        assert ":?" in environment.pop("CLUSTER_TOKEN")
        settings = settings_of({"LLAMESH_LISTEN_ADDR": "0.0.0.0:8080", **environment})
        assert (settings.node_id, settings.cluster.enabled) == (name, True)
        assert settings.cluster.listen_addr is not None
        [peer] = settings.cluster.peers
        assert peer.address.host in set(nodes) - {name}
        assert peer.address.port == settings.cluster.listen_addr.port
        assert node["stop_grace_period"] == "60s"
        assert (node["read_only"], node["cap_drop"]) == (True, ["ALL"])
    for service in services.values():
        # Published to this machine alone: there is no key by default.
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    [prometheus] = documents(DEPLOY / "docker/prometheus.yml")
    [job] = prometheus["scrape_configs"]
    assert job["static_configs"][0]["targets"] == [f"{name}:8080" for name in nodes]


def test_promtool_likes_the_configuration() -> None:
    if shutil.which("promtool") is None:
        pytest.skip("not installed: promtool")
    lint("promtool", "check", "config", "--syntax-only", DEPLOY / "docker/prometheus.yml")


# Kubernetes


@pytest.fixture(scope="module")
def manifests() -> dict[str, dict[str, Any]]:
    """Kind/name -> manifest."""
    base = DEPLOY / "kubernetes/base"
    [kustomization] = documents(base / "kustomization.yaml")
    assert sorted(kustomization["resources"]) == sorted(
        path.name for path in base.iterdir() if path.name != "kustomization.yaml"
    )
    found = documents(*(base / name for name in kustomization["resources"]))
    return {f"{manifest['kind']}/{manifest['metadata']['name']}": manifest for manifest in found}


def test_the_peer_list_is_the_headless_service(manifests: dict[str, Any], tmp_path: Path) -> None:
    service = manifests["Service/llamesh-peers"]["spec"]
    assert (service["clusterIP"], service["publishNotReadyAddresses"]) == ("None", True)
    files = manifests["ConfigMap/llamesh"]["data"]
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    [container] = manifests["StatefulSet/llamesh"]["spec"]["template"]["spec"]["containers"]
    plain = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    settings, _ = load_files(
        tmp_path / "config.yaml",
        tmp_path / "cookbook.yaml",
        tmp_path / "none",
        plain,
        config_required=True,
        secrets_required=False,
    )
    [peer] = settings.cluster.peers
    [port] = service["ports"]
    assert (peer.address.host, peer.address.port) == ("llamesh-peers", port["port"])
    assert manifests["StatefulSet/llamesh"]["spec"]["serviceName"] == "llamesh-peers"
    ports = {entry["name"]: entry["containerPort"] for entry in container["ports"]}
    assert settings.cluster.listen_addr is not None
    assert ports == {"http": settings.listen_addr.port, "peers": settings.cluster.listen_addr.port}


def pre_stop(manifests: dict[str, Any]) -> list[str]:
    """The command that is run before a pod ends."""
    [container] = manifests["StatefulSet/llamesh"]["spec"]["template"]["spec"]["containers"]
    command: list[str] = container["lifecycle"]["preStop"]["exec"]["command"]
    return command


def test_pods_are_looked_after_and_drained(manifests: dict[str, Any]) -> None:
    pod = manifests["StatefulSet/llamesh"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    # A node that drains is alive.
    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"
    program, *words = pre_stop(manifests)
    assert f"/usr/local/bin/{program}" in (DEPLOY / "docker/Dockerfile").read_text()
    assert words[:2] == container["args"][:2]
    enough = float(words[-1]) + GRACE_SECONDS + LAST_SECONDS
    assert pod["terminationGracePeriodSeconds"] >= enough
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    selector = manifests["StatefulSet/llamesh"]["spec"]["selector"]["matchLabels"]
    for name in ("Service/llamesh", "Service/llamesh-peers"):
        assert manifests[name]["spec"]["selector"] == selector


def test_the_manifests_fit_their_schemas(tools: Path, manifests: dict[str, Any], tmp_path: Path) -> None:
    paths = []
    for name, manifest in manifests.items():
        path = tmp_path / (name.replace("/", "-") + ".yaml")
        with path.open("w") as file:
            YAML(typ="safe").dump(manifest, file)
        paths.append(path)
    lint(tools / "kubernetes-validate", "--strict", "-k", KUBERNETES, *paths)


# Draining


async def test_what_is_run_before_a_pod_ends_waits_for_its_requests(
    manifests: dict[str, Any], tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    slow = fake_profile_file(tmp_path, "slow", gate=str(gate), gate_after=1, tokens=3)
    async with running_node(
        tmp_path / "node", cookbook(slow=profile(slow)), binary_path=FAKE_LLAMA_SERVER
    ) as node:
        _, option, _, *words = pre_stop(manifests)
        async with node.client.stream("POST", CHAT, json=chat("slow", stream=True)) as reply:
            pieces = reply.aiter_text()
            assert "data: " in await anext(pieces)
            drain = subprocess.Popen(
                [sys.executable, "-m", "llamesh", option, str(node.directory / "config.yaml"), *words],
                env=clean_environment({"LLAMESH_LISTEN_ADDR": f"127.0.0.1:{node.port}"}),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            try:
                await wait_document(node, "/readyz", lambda document: document["status"] == "draining")
                refused = await ask(node, "slow")
                assert (refused.status_code, error_of(refused)["type"]) == (503, "draining")
                assert drain.poll() is None
                gate.touch()
                rest = "".join([piece async for piece in pieces])
                assert rest.rstrip().endswith("[DONE]")
                assert await trio.to_thread.run_sync(drain.wait) == 0
            finally:
                drain.kill()
                drain.communicate()
        await wait_running(node, 0)
        assert await node.stop(signal.SIGTERM) == 0
