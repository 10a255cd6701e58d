"""Whom a node believes: pins, trust on first use, rotation, and a file that people edit, too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamesh.mesh import known_peers
from llamesh.mesh.identity import Identity
from llamesh.mesh.key_files import IdentityError, locked
from llamesh.mesh.known_peers import KnownPeers
from llamesh.mesh.trust import Claim, ItsMe, NotTrusted, key_text
from tests.support.node import clean_environment

ME = Identity("me", b"\x11" * 32, b"\x12" * 32)
A, B, C = (bytes([number]) * 32 for number in (1, 2, 3))


def claim(node_id: str, key: bytes, previous: bytes | None = None) -> Claim:
    return Claim(node_id, key, previous, "10.0.0.9:8080")


def peers(directory: Path, *, allowed: tuple[bytes, ...] = (), tofu: bool = True) -> KnownPeers:
    directory.chmod(0o700)
    return KnownPeers(directory / "known_peers", [key_text(key) for key in allowed], tofu)


def write(directory: Path, text: str) -> Path:
    path = directory / "known_peers"
    path.write_text(text)
    path.chmod(0o600)
    return path


def believe(known: KnownPeers, one: Claim) -> None:
    """As a connection that stands: checked, noted, saved."""
    known.check(one, ME)
    known.note(one)
    assert known.save() == ()


def refusal(known: KnownPeers, one: Claim) -> str:
    with pytest.raises(NotTrusted) as caught:
        known.check(one, ME)
    assert not isinstance(caught.value, ItsMe)
    return str(caught.value)


def test_a_stranger_is_believed_once_and_then_known(tmp_path: Path) -> None:
    known = peers(tmp_path)
    known.check(claim("a", A), ME)
    assert known.pins() == {}  # a check alone pins nothing
    known.check(claim("a", B), ME)
    believe(known, claim("a", A))
    again = peers(tmp_path)
    assert again.pins() == {"a": A}
    again.check(claim("a", A), ME)
    text = refusal(again, claim("a", B))
    assert key_text(B) in text
    assert "10.0.0.9:8080" in text
    assert f"remove line 2 of a from {tmp_path / 'known_peers'} of me" in text
    assert (tmp_path / "known_peers").stat().st_mode & 0o777 == 0o600


def test_removing_the_line_has_the_node_trusted_anew(tmp_path: Path) -> None:
    known = peers(tmp_path)
    believe(known, claim("a", A))
    path = tmp_path / "known_peers"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:1]))
    refusal(known, claim("a", B))
    assert known.refresh()
    assert not known.refresh()
    believe(known, claim("a", B))
    path.unlink()
    assert known.refresh()
    assert known.pins() == {}


def test_one_key_may_own_several_ids(tmp_path: Path) -> None:
    known = peers(tmp_path)
    believe(known, claim("a", A))
    believe(known, claim("b", A))
    assert peers(tmp_path).pins() == {"a": A, "b": A}


def test_two_nodes_of_one_key_store_are_two_nodes(tmp_path: Path) -> None:
    believe(peers(tmp_path), claim("sister", ME.public))


def test_a_node_knows_itself(tmp_path: Path) -> None:
    known = peers(tmp_path, allowed=(A,), tofu=False)
    with pytest.raises(ItsMe):
        known.check(claim("me", ME.public), ME)
    text = refusal(known, claim("me", A))
    assert "another node" in text
    assert "give each node its own node_id" in text


def test_without_trust_on_first_use_a_stranger_gets_the_line_to_add(tmp_path: Path) -> None:
    known = peers(tmp_path, tofu=False)
    text = refusal(known, claim("a", A))
    line = text.rpartition(": ")[2]
    write(tmp_path, line)
    known.refresh()
    known.check(claim("a", A), ME)
    refusal(known, claim("b", A))  # the key is known, but not for that name


def test_allowed_keys_are_the_only_ones(tmp_path: Path) -> None:
    believe(peers(tmp_path), claim("b", B))
    known = peers(tmp_path, allowed=(A, C), tofu=False)
    believe(known, claim("a", A))
    for one in (claim("b", B), claim("new", B), claim("a", B, A)):
        assert f"add {key_text(B)} there" in refusal(known, one)
    assert "a" in refusal(known, claim("a", C))  # allowed, but the name is another's


def test_a_proven_rotation_moves_the_pin(tmp_path: Path) -> None:
    known = peers(tmp_path)
    believe(known, claim("a", A))
    refusal(known, claim("a", B, C))
    believe(known, claim("a", B, A))
    assert peers(tmp_path).pins() == {"a": B}
    refusal(known, claim("a", A))
    refusal(known, claim("a", C, A))
    believe(known, claim("a", B))


def test_a_rotation_keeps_its_line(tmp_path: Path) -> None:
    write(tmp_path, f"# mine\n  a   {key_text(A)} 2020-01-01  # the one in the cellar\n\nb {key_text(B)}")
    known = peers(tmp_path)
    believe(known, claim("a", C, A))
    believe(known, claim("d", A))
    lines = (tmp_path / "known_peers").read_text().splitlines()
    assert lines[:4] == [
        "# mine",
        f"  a   {key_text(C)} 2020-01-01  # the one in the cellar",
        "",
        f"b {key_text(B)}",
    ]
    assert lines[4].startswith(f"d {key_text(A)} 20")
    assert len(lines) == 5


def test_two_rotations_before_a_save(tmp_path: Path) -> None:
    known = peers(tmp_path)
    believe(known, claim("a", A))
    for one in (claim("a", B, A), claim("a", C, B)):
        known.check(one, ME)
        known.note(one)
    assert known.save() == ()
    assert peers(tmp_path).pins() == {"a": C}


def test_what_isnt_understood_is_kept_and_told(tmp_path: Path) -> None:
    text = (
        f"some words\njust-one\nx noise25519:short\na {key_text(A)} anything at all\n"
        f"a {key_text(B)}\n\x0b\x0c\nc {key_text(C)}\r\n"
    )
    path = write(tmp_path, text)
    known = peers(tmp_path)
    assert known.pins() == {"a": A, "c": C}
    warnings = "\n".join(known.warnings)
    for number in (1, 2, 3, 5):
        assert f"{path}:{number}: " in warnings
    assert len(known.warnings) == 4
    assert "line 4 counts" in warnings
    believe(known, claim("d", B))
    assert path.read_bytes().startswith(text.encode())


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o602])
def test_a_file_that_others_can_use(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path, f"a {key_text(A)}\n")
    path.chmod(mode)
    with pytest.raises(IdentityError, match=f"chmod 600 {path}"):
        peers(tmp_path)


def test_a_file_that_turns_bad_changes_nothing(tmp_path: Path) -> None:
    known = peers(tmp_path)
    believe(known, claim("a", A))
    path = tmp_path / "known_peers"
    for content in (b"\xff\xfe\xfd", b"x" * (1 << 20) + b"y"):
        path.write_bytes(content)
        with pytest.raises(IdentityError):
            known.refresh()
        known.note(claim("b", B))
        with pytest.raises(IdentityError):
            known.save()
        assert path.read_bytes() == content
        assert known.pins() == {"a": A, "b": B}
    path.unlink()
    assert known.save() == ()  # what wasn't written stayed noted
    assert peers(tmp_path).pins() == {"b": B}


def test_claims_that_name_nothing(tmp_path: Path) -> None:
    known = peers(tmp_path)
    for node_id in ("", "a b", "a\nb", "#", "x" * 65):
        assert "can't be a node id" in refusal(known, claim(node_id, A))
    assert "can't be a node id" in refusal(known, claim("a", A[:31]))


def test_who_holds_the_token_cant_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_peers, "MOST_PINS", 3)
    known = peers(tmp_path)
    for number in range(3):
        believe(known, claim(f"n{number}", A))
    late = claim("late", A)
    assert "already holds 3 nodes" in refusal(known, late)
    with pytest.raises(NotTrusted):
        known.note(late)
    believe(known, claim("n0", A))
    believe(known, claim("n0", B, A))


def test_the_bounds_fit_together() -> None:
    longest = f"{'x' * 64} {key_text(A)} 2026-01-01\n"
    assert known_peers.MOST_PINS * len(longest) < known_peers._LARGEST_BYTES


def test_of_two_first_claims_the_quicker_one_counts(tmp_path: Path) -> None:
    known = peers(tmp_path)
    for one in (claim("a", A), claim("a", B)):
        known.check(one, ME)
    known.note(claim("a", A))
    with pytest.raises(NotTrusted):
        known.note(claim("a", B))


def test_two_nodes_that_share_the_file_add_up(tmp_path: Path) -> None:
    one, other = peers(tmp_path), peers(tmp_path)
    believe(one, claim("a", A))
    believe(other, claim("b", B))
    assert peers(tmp_path).pins() == {"a": A, "b": B} == other.pins()
    one.refresh()
    assert one.pins() == {"a": A, "b": B}


def test_what_the_other_node_pinned_first_stays(tmp_path: Path) -> None:
    one, other = peers(tmp_path), peers(tmp_path)
    one.note(claim("a", A))
    other.note(claim("a", B))
    other.note(claim("c", C))
    assert one.save() == ()
    assert other.save() == (Claim("a", B, None, ""),)
    assert other.pins() == {"a": A, "c": C}
    assert other.save() == ()


def test_the_same_rotation_seen_by_both(tmp_path: Path) -> None:
    believe(peers(tmp_path), claim("a", A))
    one, other = peers(tmp_path), peers(tmp_path)
    for known in (one, other):
        believe(known, claim("a", B, A))
    assert peers(tmp_path).pins() == {"a": B}


def test_processes_that_save_at_once_lose_nothing(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom llamesh.mesh.known_peers import KnownPeers\n"
        "from llamesh.mesh.trust import Claim\n"
        "known = KnownPeers(Path(sys.argv[1]), (), True)\n"
        "for number in range(20):\n"
        "    known.note(Claim(f'{sys.argv[2]}-{number}', bytes([number]) * 32, None, ''))\n"
        "    assert known.save() == ()\n"
    )
    tmp_path.chmod(0o700)
    path = tmp_path / "known_peers"
    others = [
        subprocess.Popen([sys.executable, "-c", program, str(path), name], env=clean_environment({}))
        for name in ("x", "y", "z")
    ]
    assert [other.wait(timeout=60) for other in others] == [0, 0, 0]
    assert len(peers(tmp_path).pins()) == 60


def test_a_locked_file_is_waited_for_and_then_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamesh.mesh.key_files.LOCK_SECONDS", 0.02)
    known = peers(tmp_path)
    known.note(claim("a", A))
    with locked(known.path), pytest.raises(IdentityError, match=r"known_peers\.lock"):
        known.save()
    assert known.save() == ()


def test_the_directory_is_made_when_there_is_something_to_keep(tmp_path: Path) -> None:
    known = KnownPeers(tmp_path / "new" / "known_peers", (), True)
    assert not (tmp_path / "new").exists()
    believe(known, claim("a", A))
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


def test_a_person_vouches(tmp_path: Path) -> None:
    known = peers(tmp_path, tofu=False)
    assert known.trust("a", A)
    known.save()
    assert not known.trust("a", A)
    with pytest.raises(NotTrusted, match=f"{known.path}:2"):
        known.trust("a", B)
    assert known.trust("a", B, replace=True)
    known.save()
    assert peers(tmp_path).pins() == {"a": B}


IDS = st.sampled_from(["a", "b", "c"])
KEYS = st.sampled_from([A, B, C])


@given(st.lists(st.tuples(st.booleans(), IDS, KEYS, st.none() | KEYS, st.booleans()), max_size=12))
def test_no_history_gives_a_name_to_a_key_without_proof(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[bool, str, bytes, bytes | None, bool]]
) -> None:
    """Two nodes on one file: each pin is the first key of its name, or led there by proofs."""
    directory = tmp_path_factory.mktemp("history")
    sharing = peers(directory), peers(directory)
    pinned: dict[str, bytes] = {}
    for second, node_id, key, previous, look in steps:
        known = sharing[second]
        if look:
            known.refresh()
        one = claim(node_id, key, previous)
        believed = known.pins().get(node_id)
        try:
            known.check(one, ME)
            changed = known.note(one)
        except NotTrusted:
            assert believed is not None
            assert believed not in (key, previous)
            continue
        if not changed:
            assert believed == key  # maybe not any more on disk: that is what `refresh` is for
        elif known.save():
            assert pinned[node_id] not in (key, believed)
        else:
            assert pinned.get(node_id) in (None, previous, key)
            pinned[node_id] = key
        assert peers(directory).pins() == pinned


@given(st.binary(max_size=300))
def test_any_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    directory = tmp_path_factory.mktemp("any")
    path = directory / "known_peers"
    path.write_bytes(content)
    os.chmod(path, 0o600)
    try:
        known = peers(directory)
    except IdentityError:
        return
    known.note(claim("node", A))
    known.save()
    assert content.removeprefix(b"\xef\xbb\xbf") in path.read_bytes()
