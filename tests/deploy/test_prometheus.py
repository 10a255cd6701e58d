"""Alerts and dashboard, against a real Prometheus that scrapes real nodes."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from ruamel.yaml import YAML

from tests.end_to_end.mesh.parts import fakes
from tests.support.fake import FAKE_LLAMA_SERVER
from tests.support.mesh import Mesh, reserved_port, running_mesh
from tests.support.node import CHECKOUT, clean_environment

ALERTS = CHECKOUT / "deploy/prometheus/alerts.yml"
ALERTS_TEST = CHECKOUT / "deploy/prometheus/alerts_test.yml"
DASHBOARD = CHECKOUT / "deploy/grafana/llamesh.json"
COMPOSE = CHECKOUT / "deploy/docker/compose.yaml"

# Panels that are empty where all is well, nobody has a key, or there is no GPU.
MAY_BE_EMPTY = {
    "VRAM",
    "Tokens by key",
    "Doesn't load",
    "Open breakers",
    "Forwards that went elsewhere",
    "Turned away",
    "Models, measured",  # by a sampler that looks now and then
}

# Generous: on a busy machine, two scrapes take a while.
PATIENCE_SECONDS = 60.0

VARIABLES = {"$__rate_interval": "1m", "$node": ".*", "$model": ".*", "${datasource}": "none"}


def tool(name: str) -> str:
    """A program of Debian's package `prometheus`."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"not installed: {name}")
    return found


def dashboard() -> dict[str, Any]:
    document: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return document


def queries() -> Iterator[tuple[str, str]]:
    """(title of the panel, expression) of the dashboard, with values for its variables."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], plain(target["expr"])


def plain(expression: str) -> str:
    """With values for the dashboard's variables."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, expression
    return expression


def yaml(path: Path) -> Any:
    return YAML(typ="safe").load(path.read_text())


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml(ALERTS)["groups"] for rule in group["rules"]]


# Files


def test_promtool_likes_the_alerts() -> None:
    for words in (("check", "rules", ALERTS), ("test", "rules", ALERTS_TEST)):
        done = subprocess.run(
            [tool("promtool"), *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout


def test_alerts_say_what_to_do_and_each_is_tested() -> None:
    tested = ALERTS_TEST.read_text()
    for rule in rules():
        assert set(rule["annotations"]) == {"summary", "description"}, rule
        assert rule["labels"]["severity"] in ("critical", "warning"), rule
        assert len(rule["annotations"]["description"]) > 80, rule
        assert rule["alert"] in tested, rule
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)


def test_the_dashboard_is_one() -> None:
    document = dashboard()
    assert document["schemaVersion"] >= 39
    assert [variable["name"] for variable in document["templating"]["list"]] == [
        "datasource",
        "node",
        "model",
    ]
    panels = document["panels"]
    ids = [panel["id"] for panel in panels]
    assert len(set(ids)) == len(ids)
    rows = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert rows == ["Overview", "Latency", "Tokens", "Queue", "Instances", "Memory", "Mesh"]
    for panel in panels:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24, panel["title"]
        if panel["type"] != "row":
            # Whatever their Prometheus is called.
            sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
            assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)
    for one, two in itertools.combinations(panels, 2):
        assert not _overlap(one["gridPos"], two["gridPos"]), (one["title"], two["title"])


def _overlap(one: dict[str, int], two: dict[str, int]) -> bool:
    return all(one[at] < two[at] + two[size] and two[at] < one[at] + one[size] for at, size in ("xw", "yh"))


def test_metrics_of_queries_are_documented() -> None:
    """A name that nothing exposes makes an alert that never fires."""
    text = (CHECKOUT / "docs/metrics.md").read_text()
    known = set(re.findall(r"`((?:llamesh|process)_[a-z_]+)`", text)) | {"process_start_time_seconds"}
    for expression in (*(expression for _, expression in queries()), *(rule["expr"] for rule in rules())):
        for name in re.findall(r"\b(?:llamesh|process)_[a-z_]+", expression):
            assert name in known or re.sub("_(bucket|sum|count)$", "", name) in known, expression


# What mounts them


def mounts(service: dict[str, Any]) -> dict[str, Path]:
    """Path in the container -> what of the checkout is there."""
    pairs = [volume.removesuffix(":ro").split(":") for volume in service["volumes"]]
    return {target: (COMPOSE.parent / source).resolve() for source, target in pairs if source[0] == "."}


def test_the_composed_prometheus_has_the_alerts(tmp_path: Path) -> None:
    mounted = mounts(yaml(COMPOSE)["services"]["prometheus"])
    assert mounted["/etc/prometheus/alerts.yml"] == ALERTS
    for path in mounted.values():
        shutil.copy(path, tmp_path)
    check = [tool("promtool"), "check", "config", str(tmp_path / "prometheus.yml")]
    done = subprocess.run(check, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(rules())} rules found" in done.stdout


def test_the_composed_grafana_finds_its_dashboard() -> None:
    services = yaml(COMPOSE)["services"]
    grafana = services["grafana"]
    assert grafana["profiles"] == ["grafana"]
    mounted = mounts(grafana)
    assert all(path.exists() for path in mounted.values())
    provisioning = mounted["/etc/grafana/provisioning"]
    [source] = yaml(provisioning / "datasources/llamesh.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert (
        source["jsonData"]["timeInterval"]
        == yaml(mounts(services["prometheus"])["/etc/prometheus/prometheus.yml"])["global"]["scrape_interval"]
    )
    [provider] = yaml(provisioning / "dashboards/llamesh.yaml")["providers"]
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert mounted[home] == DASHBOARD
    assert str(Path(home).parent) == provider["options"]["path"]


def test_the_pod_monitor_means_the_pods() -> None:
    folder = CHECKOUT / "deploy/kubernetes"
    assert yaml(folder / "prometheus/kustomization.yaml")["resources"] == ["../base", "podmonitor.yaml"]
    spec = yaml(folder / "prometheus/podmonitor.yaml")["spec"]
    pods = yaml(folder / "base/statefulset.yaml")["spec"]["template"]
    labels = pods["metadata"]["labels"]
    assert spec["selector"]["matchLabels"].items() <= labels.items()
    assert labels[spec["jobLabel"]] == "llamesh"
    [endpoint] = spec["podMetricsEndpoints"]
    ports = [port["name"] for container in pods["spec"]["containers"] for port in container["ports"]]
    assert endpoint["port"] in ports
    assert endpoint["path"] == "/metrics"


# Against the real thing


@dataclass
class Prometheus:
    """One that runs. `client`: of its API."""

    client: httpx.AsyncClient

    async def ask(self, path: str, **parameters: str) -> Any:
        """The data of an answer that must be a success."""
        reply = await self.client.get(f"/api/v1/{path}", params=parameters)
        document = reply.json()
        assert document["status"] == "success", (parameters, document)
        assert not document.get("warnings"), (parameters, document)
        return document["data"]

    async def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples now; those that aren't a number are left out."""
        found = (await self.ask("query", query=expression))["result"]
        return [sample for sample in found if sample["value"][1] != "NaN"]

    async def wait_for(self, expression: str) -> None:
        """Until it has a sample."""
        with trio.move_on_after(PATIENCE_SECONDS):
            while not await self.query(expression):
                await trio.sleep(0.1)
            return
        raise AssertionError(f"nothing for {expression}")


@contextlib.asynccontextmanager
async def running_prometheus(folder: Path, *targets: str) -> AsyncIterator[Prometheus]:
    """A Prometheus that scrapes these addresses each second, with the alerts."""
    configuration = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(ALERTS)],
        "scrape_configs": [{"job_name": "llamesh", "static_configs": [{"targets": list(targets)}]}],
    }
    (folder / "prometheus.yml").write_text(json.dumps(configuration))
    with reserved_port() as port, (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            [
                tool("prometheus"),
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--log.level=warn",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=clean_environment({}),
        )
        try:
            async with httpx.AsyncClient(
                base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=PATIENCE_SECONDS
            ) as client:
                with trio.fail_after(PATIENCE_SECONDS):
                    while not await _is_ready(client):
                        assert process.poll() is None, (folder / "prometheus.log").read_text()
                        await trio.sleep(0.05)
                yield Prometheus(client)
        finally:
            process.kill()
            process.wait()


async def _is_ready(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/-/ready")).status_code == 200
    except httpx.TransportError:
        return False


async def _serve_a_few(mesh: Mesh) -> None:
    """Requests of each kind: streams and wholes, here and there, good and bad."""
    here = mesh["node-a"]
    for model in ("near", "far"):
        for _ in range(3):
            await here.ask(model, stream=True, max_tokens=8)
            await here.ask(model)
    assert (await here.node.client.post("/v1/chat/completions", json={"model": "none"})).status_code == 404


async def test_every_query_is_answered_by_a_real_prometheus(tmp_path: Path) -> None:
    tool("prometheus")
    cookbooks = {
        "node-a": fakes(tmp_path, near={"token_delay": 0.005}),
        "node-b": fakes(tmp_path, far={"token_delay": 0.005}),
    }
    async with running_mesh(tmp_path, cookbooks, binary_path=FAKE_LLAMA_SERVER) as mesh:
        await mesh.wait_joined()
        await mesh.wait_listed("far", at="node-a", by="node-b")
        addresses = [member.place.address for member in mesh]
        async with running_prometheus(tmp_path, *addresses) as prometheus:
            # Counters that begin beyond 0 have no rate: first a scrape without requests, then some, then
            # another.
            await prometheus.wait_for('count(up{job="llamesh"} == 1) == 2')
            await _serve_a_few(mesh)
            await prometheus.wait_for('sum(llamesh_requests_total{source="client", outcome="ok"}) == 12')
            await _serve_a_few(mesh)
            await prometheus.wait_for('sum(llamesh_requests_total{source="client", outcome="ok"}) == 24')
            await prometheus.wait_for("sum(rate(llamesh_time_to_first_token_seconds_count[1m])) > 0")

            empty = {title for title, expression in queries() if not await prometheus.query(expression)}
            assert empty <= MAY_BE_EMPTY
            for variable in dashboard()["templating"]["list"][1:]:
                metric, label = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["definition"]).groups()  # type: ignore[union-attr]
                values = await prometheus.ask(f"label/{label}/values", **{"match[]": plain(metric)})
                assert set(values) == (set(addresses) if label == "instance" else {"near", "far"})
            for annotation in dashboard()["annotations"]["list"]:
                if "expr" in annotation:
                    await prometheus.query(plain(annotation["expr"]))

            loaded = (await prometheus.ask("rules", type="alert"))["groups"]
            found = {rule["name"]: rule for group in loaded for rule in group["rules"]}
            assert set(found) == {rule["alert"] for rule in rules()}
            for rule in found.values():
                # "unknown": not evaluated yet.
                assert rule["health"] != "err", rule
                await prometheus.query(rule["query"])
            assert [name for name, rule in found.items() if rule["state"] == "firing"] == []

            # A forwarded request is one request, and its tokens were written once. The nodes are scraped one
            # after the other.
            for expected in (
                f'sum(llamesh_instance_tokens_total{{kind="generated"}}) == {2 * 2 * 3 * (8 + 5)}',
                'sum(llamesh_requests_total{source="client", model="far", node="node-b"}) == 12',
                'sum(llamesh_requests_total{source="peer", model="far", node="node-b"}) == 12',
                'sum(llamesh_time_to_first_token_seconds_count{model="near"}) == 6',
            ):
                await prometheus.wait_for(expected)
