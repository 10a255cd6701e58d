"""Identity: where key and token come from, how they are changed, and that they don't show."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamesh.config.settings import Settings
from llamesh.mesh.cluster_token import LONGEST, SHORTEST, checked_token, derive, new_token
from llamesh.mesh.identity import Identity, load_identity, public_key
from llamesh.mesh.key_files import IdentityError
from llamesh.mesh.key_store import PREVIOUS_TOKEN_SECONDS, KeyStore
from llamesh.mesh.trust import fingerprint, is_node_id, key_bytes, key_text
from tests.support.node import clean_environment

KEY = base64.b64encode(bytes(range(32))).decode()
TOKEN = base64.b64encode(bytes(range(100, 132))).decode()


def settings_for(directory: Path, node_id: str = "node-a", **noise: Any) -> Settings:
    noise = {"config_dir": str(directory), **noise}
    return Settings.model_validate({"node_id": node_id, "cluster": {"noise": noise}})


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return settings_for(tmp_path / "store")


def test_a_public_key_is_the_one_of_rfc_7748() -> None:
    """Section 5.2: the scalar 9 times the base point, after one iteration."""
    scalar = (9).to_bytes(32, "little")
    assert public_key(scalar).hex() == "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"


def test_the_first_start_makes_everything(settings: Settings) -> None:
    identity = load_identity(settings, {})
    again = load_identity(settings, {})
    assert identity.node_id == "node-a"
    assert identity.public == public_key(identity.private)
    assert identity.public_text == key_text(identity.public)
    assert key_bytes(identity.public_text) == identity.public
    assert identity.fingerprint == fingerprint(identity.public)
    assert (identity.private, identity.token) == (again.private, again.token)
    assert identity.tokens == (identity.token,)
    assert identity.previous_private is None
    assert identity.previous_token is None
    files = {path.name: path.stat().st_mode & 0o777 for path in settings.cluster.noise.config_dir.iterdir()}
    assert files == {"node.key": 0o600, "cluster_token": 0o600}


def test_nodes_that_start_at_the_same_moment_share_key_and_token(tmp_path: Path) -> None:
    """Real processes on one directory that doesn't exist yet: one key, one token, an id each."""
    program = (
        "import json, sys\nfrom pathlib import Path\n"
        "from tests.mesh.test_identity import settings_for\n"
        "from llamesh.mesh.identity import load_identity\n"
        "settings = settings_for(Path(sys.argv[1]), sys.argv[2])\n"
        "print('ready', flush=True)\nsys.stdin.readline()\n"
        "me = load_identity(settings, {})\n"
        "print(json.dumps([me.node_id, me.private.hex(), me.token.hex()]))\n"
    )
    starts = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "store"), f"node-{number}"],
            env=clean_environment({}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    for start in starts:
        assert start.stdout is not None
        assert start.stdout.readline() == "ready\n"
    for start in starts:
        assert start.stdin is not None
        start.stdin.write("go\n")
        start.stdin.flush()
    answers = [json.loads(start.communicate(timeout=60)[0]) for start in starts]
    assert [answer[0] for answer in answers] == [f"node-{number}" for number in range(4)]
    assert len({(key, token) for _, key, token in answers}) == 1
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["cluster_token", "node.key"]


def test_the_environment_comes_first_and_touches_no_file(tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "nowhere")
    identity = load_identity(settings, {"CLUSTER_TOKEN": TOKEN, "NODE_PRIVATE_KEY": f" {KEY}\n"})
    assert identity.private == bytes(range(32))
    assert identity.token == derive(TOKEN)
    assert not (tmp_path / "nowhere").exists()


def test_an_empty_variable_sets_nothing(settings: Settings) -> None:
    plain = load_identity(settings, {})
    assert load_identity(settings, {"CLUSTER_TOKEN": "", "NODE_PRIVATE_KEY": " "}).token == plain.token


def test_files_of_other_names(tmp_path: Path) -> None:
    paths = {name: str(tmp_path / "keys" / name) for name in ("private_key_path", "previous_key_path")}
    settings = settings_for(tmp_path / "store", **paths)
    first = load_identity(settings, {})
    KeyStore(settings, {}).rotate_key()
    second = load_identity(settings, {})
    assert second.previous_private == first.private
    assert (tmp_path / "keys" / "private_key_path").read_text().strip() == base64.b64encode(
        second.private
    ).decode()
    assert {path.name for path in (tmp_path / "store").iterdir()} == {"cluster_token"}


@pytest.mark.parametrize(
    "text", ["", "x", "not base64 !!", KEY[:-4], KEY + "AAAA", base64.b64encode(bytes(32)).decode()]
)
def test_a_key_that_is_none(settings: Settings, text: str) -> None:
    load_identity(settings, {})
    path = settings.cluster.noise.config_dir / "node.key"
    path.write_text(text)
    with pytest.raises(IdentityError) as caught:
        load_identity(settings, {})
    assert caught.value.path == str(path)
    assert f"rm {path}" in caught.value.remedy
    if text.strip():
        with pytest.raises(IdentityError, match="environment variable NODE_PRIVATE_KEY") as caught:
            load_identity(settings, {"NODE_PRIVATE_KEY": text})
        assert len(text) < 5 or text not in str(caught.value)


@pytest.mark.parametrize("text", ["short", "ü" * 20, "a\tb" * 10, "x" * (LONGEST + 1), "\x1b[31m" * 5])
def test_a_token_that_is_none(settings: Settings, text: str) -> None:
    load_identity(settings, {})
    path = settings.cluster.noise.config_dir / "cluster_token"
    path.write_text(text, encoding="utf-8")
    for environ, where in (({}, str(path)), ({"CLUSTER_TOKEN": text}, "environment variable CLUSTER_TOKEN")):
        with pytest.raises(IdentityError) as caught:
            load_identity(settings, environ)
        assert caught.value.path == where
        assert text not in str(caught.value)


def test_bytes_that_are_no_text(settings: Settings) -> None:
    load_identity(settings, {})
    path = settings.cluster.noise.config_dir / "cluster_token"
    path.write_bytes(b"\xff" * 40)
    with pytest.raises(IdentityError, match="isn't plain text"):
        load_identity(settings, {})


@pytest.mark.parametrize("name", ["node.key", "cluster_token", "node.key.previous", "cluster_token.previous"])
def test_each_file_is_checked(settings: Settings, name: str) -> None:
    store = KeyStore(settings, {})
    load_identity(settings, {})
    store.rotate_key()
    store.rotate_token()
    path = settings.cluster.noise.config_dir / name
    path.chmod(0o644)
    with pytest.raises(IdentityError, match=f"chmod 600 {path}"):
        load_identity(settings, {})


def test_a_directory_that_was_opened_up(settings: Settings) -> None:
    load_identity(settings, {})
    settings.cluster.noise.config_dir.chmod(0o755)
    with pytest.raises(IdentityError, match=f"chmod 700 {settings.cluster.noise.config_dir}"):
        load_identity(settings, {})


def test_a_rotated_token_leaves_the_former_one_for_a_while(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load_identity(settings, {})
    fresh = KeyStore(settings, {}).rotate_token()
    after = load_identity(settings, {})
    assert after.token == derive(fresh) != before.token
    assert after.previous_token == before.token
    assert after.tokens == (after.token, before.token)
    # A node that runs on forgets it in time, too, not only one that starts then.
    later = time.time() + PREVIOUS_TOKEN_SECONDS + 1
    monkeypatch.setattr(time, "time", lambda: later)
    assert after.previous_token is None
    assert after.tokens == (after.token,)
    assert load_identity(settings, {}).former_token is None


def test_a_clock_that_was_wrong_keeps_no_token_alive(settings: Settings) -> None:
    load_identity(settings, {})
    store = KeyStore(settings, {})
    store.rotate_token()
    future = time.time() + 10 * 365 * 86_400
    os.utime(store.previous_token_path, (future, future))
    previous = store.previous_token()
    assert previous is not None
    assert previous.until <= time.time() + PREVIOUS_TOKEN_SECONDS


def test_a_token_of_another_mesh_ends_the_former_one(settings: Settings) -> None:
    store = KeyStore(settings, {})
    store.token()
    store.rotate_token()
    store.adopt_token(TOKEN, keep_previous=False)
    identity = load_identity(settings, {})
    assert identity.tokens == (derive(TOKEN),)
    assert not store.previous_token_path.exists()
    store.adopt_token(TOKEN, keep_previous=True)  # nothing changes, so nothing is former
    assert not store.previous_token_path.exists()


def test_a_rotated_key_proves_the_former_one(settings: Settings) -> None:
    before = load_identity(settings, {})
    KeyStore(settings, {}).rotate_key()
    after = load_identity(settings, {})
    assert after.private != before.private
    assert after.previous_private == before.private


def test_a_rotation_half_seen_has_no_former_one(settings: Settings) -> None:
    """Between the two writes of another process, or after a crash there."""
    load_identity(settings, {})
    directory = settings.cluster.noise.config_dir
    for name in ("node.key", "cluster_token"):
        copy = directory / f"{name}.previous"
        copy.write_bytes((directory / name).read_bytes())
        copy.chmod(0o600)
    identity = load_identity(settings, {})
    assert identity.previous_private is None
    assert identity.previous_token is None


@pytest.mark.parametrize(
    ("variable", "value", "rotate"),
    [("CLUSTER_TOKEN", TOKEN, "rotate_token"), ("NODE_PRIVATE_KEY", KEY, "rotate_key")],
)
def test_what_the_environment_says_cant_be_rotated_here(
    settings: Settings, variable: str, value: str, rotate: str
) -> None:
    with pytest.raises(IdentityError, match=f"environment variable {variable}: is set") as caught:
        getattr(KeyStore(settings, {variable: value}), rotate)()
    assert value not in str(caught.value)
    assert not settings.cluster.noise.config_dir.exists()


def test_a_passphrase_is_a_token() -> None:
    words = "correct horse battery staple"
    assert derive(words) != derive(words + "s")
    assert len(derive(words)) == 32
    # Fixed for ever: nodes of different versions must derive the same.
    assert derive(words).hex() == "6d084ed444db63ea941442c08b213b8918c96c9bd73dc83e5b2aff282e7e6c9f"
    assert derive(TOKEN).hex() == "69474b0c0d5335f5ad2135f84942110f8142c2fe8cdbe69de9a0c1e1ecf542c5"


def test_a_new_token_is_one() -> None:
    assert checked_token(new_token()) != checked_token(new_token())


@given(st.text(max_size=400))
def test_a_token_is_refused_or_stays_what_it_is(text: str) -> None:
    try:
        token = checked_token(text)
    except ValueError:
        return
    assert token == text.strip()
    assert SHORTEST <= len(token) <= LONGEST
    assert token.isascii()


@given(st.binary(min_size=32, max_size=32))
def test_a_key_has_one_text(key: bytes) -> None:
    assert key_bytes(key_text(key)) == key
    assert len(fingerprint(key)) == 19


@given(st.text(max_size=80) | st.text(max_size=60).map("noise25519:".__add__))
def test_any_text_is_a_key_or_refused(text: str) -> None:
    try:
        key = key_bytes(text)
    except ValueError:
        return
    assert key_text(key) == text


def test_base64_that_is_almost_a_key() -> None:
    """The bits behind the last byte would give one key several texts."""
    text = key_text(bytes(32))
    with pytest.raises(ValueError, match="44 characters"):
        key_bytes(text[:-2] + "B=")


def test_node_ids() -> None:
    assert is_node_id("Node-1_a.b")
    assert not any(map(is_node_id, ["", "a b", "a\n", "ü", "x" * 65, "a/b"]))


def test_nothing_secret_shows(settings: Settings) -> None:
    store = KeyStore(settings, {"CLUSTER_TOKEN": TOKEN, "NODE_PRIVATE_KEY": KEY})
    KeyStore(settings, {}).token()
    KeyStore(settings, {}).rotate_token()
    identity = load_identity(settings, {})
    given_by_environment = load_identity(settings, {"CLUSTER_TOKEN": TOKEN, "NODE_PRIVATE_KEY": KEY})
    shown = f"{store!r} {store} {store.previous_token()!r} {identity!r} {identity} {given_by_environment!r}"
    for one in (identity, given_by_environment):
        for secret in (one.private, one.token, one.former_token or b"none"):
            assert secret.hex() not in shown
            assert base64.b64encode(secret).decode() not in shown
            assert repr(secret) not in shown
        assert one.public_text in shown
    assert TOKEN not in shown


def test_identities_arent_compared_by_their_secrets(settings: Settings) -> None:
    one, other = load_identity(settings, {}), load_identity(settings, {})
    assert one != other
    assert Identity("x", one.private, one.token).public == one.public
