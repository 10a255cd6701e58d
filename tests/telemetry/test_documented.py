"""docs/metrics.md says what there is: each name with its type and labels, and no other."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from llamesh.telemetry.key_figures import KeyFigures
from llamesh.telemetry.mesh_figures import MeshFigures, PeerFigures
from llamesh.telemetry.prometheus import Gauges, NodeCollector, ProfileFigures
from llamesh.telemetry.stats import NodeStats

DOCS = Path(__file__).parents[2] / "docs/metrics.md"

ROW = re.compile(
    r"^\| `((?:llamesh|process)_\w+)` \| (counter|gauge|histogram) \|([^|]*)\| ([^|]+) \| ([^|]+) \|$", re.M
)


def everything() -> NodeCollector:
    """Of a node where all that can be counted has happened."""
    stats = NodeStats()
    one = stats.profile("m:default")
    one.requests_total = one.starts_total = 1
    one.outcomes["ok", "a", "client"] = 1
    stats.rejected["model_not_found"] = stats.builds["built"] = stats.forward_retries["lost"] = 1
    stats.count_served("a")
    peer = PeerFigures("b", True, 0.1, "closed", {"lost": 0}, 1, {"idle": 1})
    gauges = Gauges(
        {("m:default", "ready"): 1},
        {"m:default": ProfileFigures()},
        ready=True,
        memory={("vram", "total"): 1},
        profile_memory={("m:default", "vram", "measured"): 1},
        mesh=MeshFigures({}, [peer], {("in", "root"): (1, 1)}, {("dialler", "ok"): 1}),
        certificate_expiry=1.0,
        keys={"team": KeyFigures(refused=Counter(models=1))},
    )
    info = dict.fromkeys(("version", "node", "engine", "engine_version"), "x")
    return NodeCollector(stats, lambda: gauges, lambda: info)


def test_the_table_is_what_a_scrape_has() -> None:
    exposed = {}
    for family in everything().families():
        name = family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
        assert family.samples, name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        exposed[name] = ("gauge" if family.type == "info" else family.type, labels)
    found = ROW.findall(DOCS.read_text())
    documented = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels, _, _ in found}
    assert len(documented) == len(found)
    assert documented == exposed


def test_alerts_are_listed() -> None:
    rules = (DOCS.parents[1] / "deploy/prometheus/alerts.yml").read_text()
    text = DOCS.read_text()
    assert [name for name in re.findall(r"alert: (\w+)", rules) if f"`{name}`" not in text] == []
