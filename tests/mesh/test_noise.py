"""The handshake and the records without I/O: what opens, and that nothing else ever does."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamesh.mesh import records
from llamesh.mesh.noise import (
    MESSAGE_1,
    MESSAGE_2,
    MESSAGE_3,
    PREAMBLE,
    HandshakeFailed,
    Initiator,
    Responder,
    frame,
    public_key,
    rotation_proof,
)
from llamesh.mesh.records import (
    DATA,
    END,
    HEADER_SIZE,
    HELLO,
    RECORD_SIZE,
    REFUSED,
    TAG_SIZE,
    RecordBroken,
    Records,
    Session,
)
from tests.mesh.noise_pairs import OTHER_TOKEN, TOKEN

ONE, TWO = b"\x11" * 32, b"\x22" * 32


def strip(framed: bytes, size: int) -> bytes:
    """The message in a frame, which must have this size."""
    assert framed[:2] == size.to_bytes(2, "big")
    assert len(framed) == 2 + size
    return framed[2:]


def shake(*tokens: bytes, token: bytes = TOKEN) -> tuple[Session, Session]:
    """A whole handshake; the dialler's session and the acceptor's. The acceptor has `tokens`."""
    initiator = Initiator(ONE, token)
    responder = Responder(TWO, tokens or (TOKEN,))
    start = initiator.start()
    assert start.startswith(PREAMBLE)
    message_2 = responder.first(strip(start[len(PREAMBLE) :], MESSAGE_1))
    message_3 = initiator.reply(strip(message_2, MESSAGE_2))
    accepted = responder.last(strip(message_3, MESSAGE_3))
    assert initiator.session is not None
    return initiator.session, accepted


def flips(data: bytes) -> Iterator[bytes]:
    """`data` with one bit of one byte flipped, for every byte; low and high bits in turn."""
    for at, byte in enumerate(data):
        yield data[:at] + bytes([byte ^ (1 << at % 8)]) + data[at + 1 :]


# The handshake.


def test_both_sides_agree_and_know_each_other() -> None:
    dialled, accepted = shake()
    assert dialled.handshake_hash == accepted.handshake_hash
    assert dialled.remote_static == public_key(TWO)
    assert accepted.remote_static == public_key(ONE)
    for sender, receiver in ((dialled, accepted), (accepted, dialled)):
        for size in (0, 1, 1000, 65_519):
            record = sender.encrypt(HELLO, b"x" * size)
            assert len(record) == HEADER_SIZE + size + TAG_SIZE
            assert receiver.decrypt(record[:HEADER_SIZE], record[HEADER_SIZE:]) == b"x" * size


def test_no_two_handshakes_are_alike() -> None:
    one, two = shake()[0], shake()[0]
    assert one.handshake_hash != two.handshake_hash
    assert one.encrypt(DATA, b"x" * 64) != two.encrypt(DATA, b"x" * 64)


@pytest.mark.parametrize("tokens", [(TOKEN, OTHER_TOKEN), (OTHER_TOKEN, TOKEN)])
def test_any_of_the_acceptors_tokens_will_do(tokens: tuple[bytes, bytes]) -> None:
    dialled, accepted = shake(*tokens)
    record = dialled.encrypt(DATA, b"hello")
    assert accepted.decrypt(record[:3], record[3:]) == b"hello"


@pytest.mark.parametrize("tokens", [(OTHER_TOKEN,), (OTHER_TOKEN, b"v" * 32)])
def test_another_token_fails_and_is_called_that(tokens: tuple[bytes, ...]) -> None:
    with pytest.raises(HandshakeFailed, match="llamesh token") as caught:
        shake(*tokens)
    assert caught.value.reason == "token"


def test_an_acceptor_without_the_token_learns_nothing_but_the_key() -> None:
    """The dialler can't notice before the acceptor's first record: it must not open."""
    initiator, responder = Initiator(ONE, TOKEN), Responder(TWO, [OTHER_TOKEN])
    message_2 = responder.first(initiator.start()[len(PREAMBLE) + 2 :])
    initiator.reply(message_2[2:])
    dialled = initiator.session
    assert dialled is not None
    # The best it can do: a session of its own making, with all it knows but the token.
    forged = Session(os.urandom(32), os.urandom(32), dialled.handshake_hash, public_key(ONE))
    record = forged.encrypt(records.WELCOME, b"{}")
    with pytest.raises(RecordBroken):
        dialled.decrypt(record[:3], record[3:])


def test_each_flipped_byte_of_message_1_fails_at_the_latest_with_message_2() -> None:
    initiator = Initiator(ONE, TOKEN)
    message = initiator.start()[len(PREAMBLE) + 2 :]
    for changed in flips(message):
        responder = Responder(TWO, [TOKEN])
        with pytest.raises(HandshakeFailed) as caught:
            responder.first(changed)
        assert caught.value.reason == "garbage"


def test_each_flipped_byte_of_message_2_fails() -> None:
    for at in range(MESSAGE_2):
        initiator, responder = Initiator(ONE, TOKEN), Responder(TWO, [TOKEN])
        message = bytearray(responder.first(initiator.start()[len(PREAMBLE) + 2 :])[2:])
        message[at] ^= 1 << at % 8
        with pytest.raises(HandshakeFailed) as caught:
            initiator.reply(bytes(message))
        assert caught.value.reason == "garbage"
        assert initiator.session is None


def test_each_flipped_byte_of_message_3_fails() -> None:
    for at in range(MESSAGE_3):
        initiator, responder = Initiator(ONE, TOKEN), Responder(TWO, [TOKEN, OTHER_TOKEN])
        message_2 = responder.first(initiator.start()[len(PREAMBLE) + 2 :])
        message = bytearray(initiator.reply(message_2[2:])[2:])
        message[at] ^= 1 << at % 8
        with pytest.raises(HandshakeFailed) as caught:
            responder.last(bytes(message))
        # The last 16 bytes are the proof of the token.
        assert caught.value.reason == ("garbage" if at < 48 else "token")


@pytest.mark.parametrize("extra", [-1, 1])
def test_a_message_of_another_length_fails(extra: int) -> None:
    def other(message: bytes) -> bytes:
        return message[:extra] if extra < 0 else message + b"\x00"

    initiator, responder = Initiator(ONE, TOKEN), Responder(TWO, [TOKEN])
    message_1 = initiator.start()[len(PREAMBLE) + 2 :]
    with pytest.raises(HandshakeFailed, match="no llamesh handshake"):
        responder.first(other(message_1))
    message_2 = responder.first(message_1)[2:]
    with pytest.raises(HandshakeFailed, match="no llamesh handshake"):
        initiator.reply(other(message_2))
    message_3 = initiator.reply(message_2)[2:]
    with pytest.raises(HandshakeFailed, match="no llamesh handshake"):
        responder.last(other(message_3))


def test_a_replayed_dialler_fails() -> None:
    """A recorded dialler meets an acceptor with a fresh ephemeral key."""
    initiator, first = Initiator(ONE, TOKEN), Responder(TWO, [TOKEN])
    message_1 = initiator.start()[len(PREAMBLE) + 2 :]
    message_3 = initiator.reply(first.first(message_1)[2:])[2:]
    first.last(message_3)
    again = Responder(TWO, [TOKEN])
    again.first(message_1)
    with pytest.raises(HandshakeFailed):
        again.last(message_3)


def test_a_replayed_acceptor_fails() -> None:
    initiator, responder = Initiator(ONE, TOKEN), Responder(TWO, [TOKEN])
    message_2 = responder.first(initiator.start()[len(PREAMBLE) + 2 :])[2:]
    other = Initiator(ONE, TOKEN)
    other.start()
    with pytest.raises(HandshakeFailed):
        other.reply(message_2)


def test_a_dialler_that_meets_its_own_words_fails() -> None:
    initiator = Initiator(ONE, TOKEN)
    echo = initiator.start()[len(PREAMBLE) + 2 :]
    with pytest.raises(HandshakeFailed):
        initiator.reply(echo + echo)


def test_public_keys_that_make_any_secret_zero_fail() -> None:
    with pytest.raises(HandshakeFailed):
        Responder(TWO, [TOKEN]).first(bytes(MESSAGE_1))
    initiator = Initiator(ONE, TOKEN)
    initiator.start()
    with pytest.raises(HandshakeFailed):
        initiator.reply(bytes(MESSAGE_2))


def test_frames() -> None:
    assert frame(b"abc") == b"\x00\x03abc"


def test_the_messages_name_no_secret() -> None:
    for what in (Initiator(ONE, TOKEN), Responder(TWO, [TOKEN]), shake()[0]):
        assert "tttt" not in repr(what)
        assert ONE.hex() not in repr(what)


# The proof of a previous key.


def test_a_proof_of_a_previous_key() -> None:
    previous, other = b"\x33" * 32, b"\x44" * 32
    dialled, accepted = shake()
    proof = rotation_proof(previous, dialled.remote_static, dialled.handshake_hash, "dialler")
    assert proof == rotation_proof(TWO, public_key(previous), accepted.handshake_hash, "dialler")
    # Not the other side's, not another session's, not another key's.
    assert proof != rotation_proof(TWO, public_key(previous), accepted.handshake_hash, "acceptor")
    assert proof != rotation_proof(TWO, public_key(previous), shake()[1].handshake_hash, "dialler")
    assert proof != rotation_proof(TWO, public_key(other), accepted.handshake_hash, "dialler")
    assert proof != rotation_proof(other, dialled.remote_static, dialled.handshake_hash, "dialler")


def test_a_previous_key_that_proves_nothing() -> None:
    with pytest.raises(ValueError, match=r"."):
        rotation_proof(ONE, bytes(32), b"h" * 32, "dialler")


# The records.


def sessions() -> tuple[Session, Session]:
    one, two = os.urandom(32), os.urandom(32)
    return Session(one, two, b"h" * 32, b"r" * 32), Session(two, one, b"h" * 32, b"r" * 32)


@given(st.lists(st.integers(1, 3000), max_size=8), st.lists(st.integers(1, 700), min_size=1, max_size=20))
def test_records_in_any_pieces(sizes: list[int], cuts: list[int]) -> None:
    """However the bytes are cut, the same data comes out, and no more is kept than a record."""
    sender, receiver = sessions()
    data = [os.urandom(size) for size in sizes]
    wire = b"".join(sender.seal(part) for part in data) + sender.encrypt(END, b"")
    taking = Records(receiver)
    got = b""
    at = 0
    for cut in itertools.cycle(cuts):
        if at >= len(wire):
            break
        got += taking.feed(wire[at : at + cut])
        at += cut
    assert got == b"".join(data)
    assert taking.ended


@pytest.mark.parametrize("size", [0, 1, RECORD_SIZE, RECORD_SIZE + 1, 5 * RECORD_SIZE + 7])
def test_any_amount_of_data(size: int) -> None:
    sender, receiver = sessions()
    data = os.urandom(size)
    sealed = sender.seal(memoryview(data))
    records_made = -(-size // RECORD_SIZE)
    assert len(sealed) == size + records_made * (HEADER_SIZE + TAG_SIZE)
    if size:
        assert Records(receiver).feed(sealed) == data


def test_each_flipped_byte_of_a_record_breaks_the_stream_for_good() -> None:
    sender, receiver = sessions()
    good = sender.seal(b"pay 10 to Bob")
    more = sender.seal(b"and so on")
    for changed in flips(good):
        taking = Records(Session(b"a" * 32, b"b" * 32, b"", b""))
        taking._session = receiver  # its counter stands still as long as nothing opens
        try:
            assert taking.feed(changed) == b""  # a longer length: it waits for the rest
            with pytest.raises(RecordBroken):
                taking.feed(more + bytes(65_536))
        except RecordBroken:
            assert taking.broken
        with pytest.raises(RecordBroken):
            taking.feed(good)
    assert Records(receiver).feed(good) == b"pay 10 to Bob"


def test_order_counts() -> None:
    for order in itertools.permutations(range(3)):
        sender, receiver = sessions()
        wire = [sender.seal(bytes([65 + number])) for number in range(3)]
        taking = Records(receiver)
        if order == (0, 1, 2):
            assert taking.feed(b"".join(wire)) == b"ABC"
        else:
            with pytest.raises(RecordBroken):
                taking.feed(b"".join(wire[number] for number in order))


@pytest.mark.parametrize("wire", [(0, 0), (0, 2), (1,)])
def test_nothing_twice_and_nothing_left_out(wire: tuple[int, ...]) -> None:
    sender, receiver = sessions()
    made = [sender.seal(b"x" * 10) for _ in range(3)]
    with pytest.raises(RecordBroken):
        Records(receiver).feed(b"".join(made[number] for number in wire))


def test_a_record_can_not_be_sent_back() -> None:
    sender, receiver = sessions()
    with pytest.raises(RecordBroken):
        Records(sender).feed(sender.seal(b"an echo"))
    assert receiver.remote_static


@pytest.mark.parametrize("kind", [HELLO, 3, 5, 0x47, 0xFF])
def test_other_kinds_have_no_place_in_a_stream(kind: int) -> None:
    sender, receiver = sessions()
    with pytest.raises(RecordBroken, match="not a record"):
        Records(receiver).feed(sender.encrypt(kind, b"x"))


def test_a_kind_can_not_be_changed() -> None:
    sender, receiver = sessions()
    record = bytearray(sender.encrypt(DATA, b""))
    record[0] = END
    taking = Records(receiver)
    with pytest.raises(RecordBroken):
        taking.feed(bytes(record))
    assert not taking.ended


def test_a_bad_header_is_noticed_before_its_body_came() -> None:
    for header in (b"\x05\x00\x20", b"\x00\x00\x0f", b"HTT"):
        with pytest.raises(RecordBroken):
            Records(sessions()[1]).feed(header)


def test_nothing_comes_after_the_end() -> None:
    sender, receiver = sessions()
    end, more = sender.encrypt(END, b""), sender.seal(b"more")
    taking = Records(receiver)
    assert taking.feed(end) == b""
    assert taking.ended
    with pytest.raises(RecordBroken, match="after the end"):
        taking.feed(more)
    sender, receiver = sessions()
    wire = sender.encrypt(END, b"") + sender.seal(b"more")
    with pytest.raises(RecordBroken, match="after the end"):
        Records(receiver).feed(wire)


def test_odd_records() -> None:
    for kind, data, complaint in ((DATA, b"", "empty"), (END, b"x", "something in it")):
        sender, receiver = sessions()
        with pytest.raises(RecordBroken, match=complaint):
            Records(receiver).feed(sender.encrypt(kind, data))


def test_a_refusal_ends_the_stream() -> None:
    sender, receiver = sessions()
    taking = Records(receiver)
    assert taking.feed(sender.seal(b"before") + sender.encrypt(REFUSED, b"{}")) == b"before"
    assert taking.ended
    assert taking.refusal == b"{}"


def test_what_is_kept_is_bounded() -> None:
    sender, receiver = sessions()
    record = sender.encrypt(DATA, bytes(65_519))
    taking = Records(receiver)
    for at in range(0, len(record) - 1, 1000):
        assert taking.feed(record[at : min(at + 1000, len(record) - 1)]) == b""
        assert len(taking._partial) <= 65_538
    assert taking.feed(record[-1:]) == bytes(65_519)
    assert not taking._partial


def test_a_used_up_session_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_MAX_RECORDS", 2)
    sender, receiver = sessions()
    wire = sender.seal(b"1") + sender.seal(b"2")
    with pytest.raises(RecordBroken, match="connect again"):
        sender.seal(b"3")
    assert Records(receiver).feed(wire) == b"12"
    with pytest.raises(RecordBroken, match="connect again"):
        receiver.decrypt(b"\x00\x00\x11", bytes(17))
