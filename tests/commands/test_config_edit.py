"""Changing config.yaml: what was there stays, what comes out means what was meant."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamesh.commands.config_edit import CannotEdit, joined, read, staged
from llamesh.config.settings import Address
from llamesh.config.yaml_source import parse_yaml

NEW = (Address("192.0.2.7", 8080), Address("fd00::7", 8080))
ADDED = """cluster:
  enabled: true
  peers:
    - "192.0.2.7:8080"
    - "[fd00::7]:8080"
"""


def data(text: str) -> Any:
    return parse_yaml(text, "config.yaml").data


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ADDED),
        ("# only a comment\n", "# only a comment\n\n" + ADDED),
        ("node_id:   a   # mine", "node_id:   a   # mine\n\n" + ADDED),
        ("---\nnode_id: a\n", "---\nnode_id: a\n\n" + ADDED),
        ("node_id: a\r\n", ("node_id: a\n\n" + ADDED).replace("\n", "\r\n")),
    ],
)
def test_without_a_cluster_section_every_byte_stays(text: str, expected: str) -> None:
    assert joined(text, "config.yaml", NEW) == expected


HAND_WRITTEN = """# My node
node_id: "a"        # the one in the cellar
listen_addr: '0.0.0.0:8080'

cluster:            # our mesh
    # who else
    peers:
        - box-b:8080     # upstairs
    noise:
        tofu: false
# keys
auth:
    enabled: true
    allowed_keys: [k1, "k2"]
"""


def test_comments_order_quotes_and_indentation_stay() -> None:
    changed = joined(HAND_WRITTEN, "config.yaml", NEW)
    assert changed == HAND_WRITTEN.replace(
        "    # who else\n    peers:\n        - box-b:8080     # upstairs\n",
        "    enabled: true\n    # who else\n    peers:\n        - box-b:8080     # upstairs\n"
        '        - "192.0.2.7:8080"\n        - "[fd00::7]:8080"\n',
    )
    before, after = data(HAND_WRITTEN), data(changed)
    assert after["cluster"] == {**before["cluster"], **after["cluster"]} | {
        "enabled": True,
        "peers": ["box-b:8080", "192.0.2.7:8080", "[fd00::7]:8080"],
    }
    assert {**after, "cluster": None} == {**before, "cluster": None}


@pytest.mark.parametrize(
    "text",
    [
        "cluster:\n",
        "cluster:\n  enabled: false\n",
        "cluster:\n  peers: []\n",
        "cluster:\n  peers:\n",
        "cluster:\n  peers:\n  - a:1\nauth:\n  allowed_keys:\n  - x\n",
        "cluster: {enabled: false, peers: [a:1]}\n",
        '{"node_id": "a", "cluster": {"noise": {"config_dir": "/x"}}}',
        '{"node_id": "a"}',
        "{}",
        "cluster:\n  peers:\n    - address: 10.0.0.1:1\n      wake_mac: 'aa:bb:cc:dd:ee:ff'\n    - b:2\n",
        "yield_to: &list [a, b]\ncluster:\n  peers: [c:1]\n",
        "max_vram_mb: 0x10\ncluster: {}\nlisten_addr: 127.0.0.1:80\n",
        "cluster:\n  noise: &n {tofu: false}\n  <<: {serve_peers: idle}\n",
    ],
)
def test_other_ways_to_write_it(text: str) -> None:
    before, after = data(text), data(joined(text, "config.yaml", NEW))
    old = (before.get("cluster") or {}).get("peers") or []
    assert after["cluster"]["enabled"] is True
    assert after["cluster"]["peers"] == [*old, "192.0.2.7:8080", "[fd00::7]:8080"]
    for name, value in before.items():
        if name != "cluster":
            assert after[name] == value


def test_what_is_right_already_stays() -> None:
    once = joined("node_id: a\n", "config.yaml", NEW)
    assert joined(once, "config.yaml", NEW) == once
    mapping = "cluster:\n  enabled: true\n  peers:\n  - {address: '192.0.2.7:8080', node_id: b}\n"
    assert joined(mapping, "config.yaml", NEW[:1]) == mapping
    assert joined("cluster:\n  enabled: true\n", "config.yaml", ()) == "cluster:\n  enabled: true\n"


@pytest.mark.parametrize(
    "text", ["- a list\n", "text\n", "cluster: 7\n", "cluster:\n  peers: {a: 1}\n", "node_id: a\n...\n"]
)
def test_what_cant_be_changed_is_told_with_the_lines_to_write(text: str) -> None:
    with pytest.raises(CannotEdit, match="write this into it yourself") as caught:
        joined(text, "config.yaml", NEW)
    assert ADDED in str(caught.value)


def test_no_yaml() -> None:
    with pytest.raises(CannotEdit, match=r"config\.yaml:2: not valid YAML"):
        joined("a: [1,\n", "config.yaml", NEW)


SCALARS = st.sampled_from(["a", "'q'", '"d"', "7", "true", "null", "", "1.50", "# no\n  x"])
BLANKS = st.sampled_from(["", "  # why", "   "])


@st.composite
def configurations(draw: st.DrawFn) -> str:
    """Text in the way of people: comments, blank lines, several indentations."""
    by = draw(st.integers(1, 4)) * " "
    lines: list[str] = []
    for name in draw(st.permutations(["node_id", "cluster", "http", "yield_to"])):
        lines += draw(st.lists(st.sampled_from(["", "# above"]), max_size=2))
        if name == "cluster":
            lines.append(f"cluster:{draw(BLANKS)}")
            if draw(st.booleans()):
                lines.append(f"{by}enabled: {draw(st.sampled_from(['true', 'false', '']))}{draw(BLANKS)}")
            if draw(st.booleans()):
                lines.append(f"{by}peers:{draw(BLANKS)}")
                dash = draw(st.sampled_from([by, by + by]))
                lines += [f"{dash}- h{n}:{n + 1}{draw(BLANKS)}" for n in range(draw(st.integers(0, 3)))]
            if draw(st.booleans()):
                lines += [f"{by}discovery:", f"{by}{by}interfaces: [ a,b ]{draw(BLANKS)}"]
        elif name == "http":
            lines += ["http:", f"{by}# below", f"{by}idle_timeout_seconds: {draw(SCALARS)}"]
        else:
            lines.append(f"{name}: {draw(SCALARS)}{draw(BLANKS)}")
    return "\n".join(lines) + draw(st.sampled_from(["", "\n", "\n# end\n"]))


@given(configurations())
def test_whatever_people_write_keeps_its_meaning_and_its_comments(text: str) -> None:
    try:
        before = data(text)
    except Exception:  # not YAML: `joined` says so, too
        with pytest.raises(CannotEdit):
            joined(text, "config.yaml", NEW)
        return
    changed = joined(text, "config.yaml", NEW)
    after = data(changed)
    assert {**after, "cluster": 0} == {**before, "cluster": 0}
    cluster = before.get("cluster") or {}
    peers = [*(cluster.get("peers") or []), *map(str, NEW)]
    assert after["cluster"] == {**cluster, "enabled": True, "peers": peers}
    # Whatever stood there stands there still, in its order; only `false` may have become `true`.
    rest = iter(changed.replace("enabled: true", "enabled: false"))
    old = text.replace("enabled: true", "enabled: false")
    assert all(letter in rest for letter in old)


def test_the_mode_and_the_symlink_stay(tmp_path: Path) -> None:
    real, link = tmp_path / "real.yaml", tmp_path / "config.yaml"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    with staged(link, "new") as draft:
        assert draft.read_text() == "new"
        assert draft.suffix == ".yaml"
        assert draft.stat().st_mode & 0o777 == 0o640
        assert real.read_text() == "old"
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert real.stat().st_mode & 0o777 == 0o640
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "real.yaml"]


def test_an_exception_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    with pytest.raises(ZeroDivisionError), staged(path, "new"):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


def test_a_folder_that_isnt_there(tmp_path: Path) -> None:
    with pytest.raises(CannotEdit, match="can't be written: No such file"), staged(tmp_path / "x" / "y", ""):
        raise AssertionError
    assert read(tmp_path / "x" / "y") == ""
    with pytest.raises(CannotEdit, match="can't be read: Is a directory"):
        read(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff")
    with pytest.raises(CannotEdit, match="isn't UTF-8"):
        read(tmp_path / "binary")
