"""The handshake of a peer connection, without I/O.

    Noise_XXpsk3_25519_ChaChaPoly_SHA256 (noiseprotocol.org, revision 34), prologue = PREAMBLE

    dialler                                        acceptor
    PREAMBLE, frame(message 1)          ->
                                        <-         frame(message 2)
    frame(message 3), HELLO record      ->
                                        <-         WELCOME record, or REFUSED, or a plain hint
    DATA records ...                    <->        DATA records ..., END

- A frame is a u16 length (big-endian) and that many bytes. The messages carry no payload of ours,
  so that each has exactly one length; nothing else is accepted.
- Records are described in `records`.
- A hint is what an acceptor says when it can't encrypt anything that the dialler could open: four
  plain bytes, 0xff 0x00 0x01 and a code. No frame and no record begins with 0xff. Anybody on the
  way can forge a hint, so it only ever becomes a part of a message for people.

The token (the pre-shared key) enters with message 3. An acceptor without it gets that far, learns the
dialler's public key, and can't open or answer the HELLO.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence
from typing import Any, Final, Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from noise.connection import Keypair, NoiseConnection
from noise.exceptions import NoiseHandshakeError, NoiseInvalidMessage, NoiseValueError

from llamesh.mesh.records import RecordBroken, Records, Session

# The first byte tells a listener that this is no HTTP and no TLS; the last one is the wire's version.
MAGIC: Final = b"\x00llamesh"
WIRE_VERSION: Final = 1
PREAMBLE: Final = MAGIC + bytes([WIRE_VERSION])

# Lengths of the three messages: e + tag; e + s + its tag + tag; s + its tag + tag.
MESSAGE_1: Final = 48
MESSAGE_2: Final = 96
MESSAGE_3: Final = 64

HINT_TOKEN: Final = b"\xff\x00\x01\x01"
HINT_VERSION: Final = b"\xff\x00\x01\x02"

_NAME = b"Noise_XXpsk3_25519_ChaChaPoly_SHA256"
_PROOF_LABEL = b"llamesh key rotation 1 "

# All that the library raises for a message that isn't what it should be.
_LIBRARY_ERRORS = (InvalidTag, ValueError, NoiseValueError, NoiseInvalidMessage, NoiseHandshakeError)

_frame_length = struct.Struct(">H").pack

Reason = Literal["token", "protocol", "closed", "version", "garbage", "timeout"]
Role = Literal["dialler", "acceptor"]


class HandshakeFailed(Exception):
    """There will be no session. The message is for people.

    `reason`: "token" (the cluster tokens differ), "version" (another wire version), "timeout",
    "protocol" (a llamesh node that broke the rules), "closed" (it broke off: it ended, or was cancelled),
    "garbage" (no llamesh node, or bytes that were changed on their way).
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason


class Initiator:
    """The dialler's side of one handshake: `start`, `reply`, then `session`."""

    def __init__(self, private: bytes, token: bytes) -> None:
        self._noise = _connection(private, token, initiator=True)
        self.session: Session | None = None

    def start(self) -> bytes:
        """The preamble and the frame of message 1."""
        return PREAMBLE + frame(self._noise.write_message())

    def reply(self, message: bytes) -> bytes:
        """The frame of message 3, given message 2. Raises HandshakeFailed."""
        _check_length(message, MESSAGE_2)
        state = self._noise.noise_protocol.handshake_state
        try:
            self._noise.read_message(message)
            last = self._noise.write_message()
        except _LIBRARY_ERRORS:
            raise _garbage() from None
        self.session = _session(self._noise, state)
        return frame(last)


class Responder:
    """The acceptor's side of one handshake: `first`, then `last`.

    Holds nothing worth mentioning before the first message is there. `tokens`: the cluster's
    token, and those that still count beside it.
    """

    def __init__(self, private: bytes, tokens: Sequence[bytes]) -> None:
        self._private = private
        self._tokens = tokens
        self._noise: Any = None

    def first(self, message: bytes) -> bytes:
        """The frame of message 2, given message 1. Raises HandshakeFailed."""
        _check_length(message, MESSAGE_1)
        self._noise = _connection(self._private, self._tokens[0], initiator=False)
        try:
            self._noise.read_message(message)
            return frame(self._noise.write_message())
        except _LIBRARY_ERRORS:
            raise _garbage() from None

    def last(self, message: bytes) -> Session:
        """The session, given message 3. Raises HandshakeFailed, "token" when no token opens it."""
        _check_length(message, MESSAGE_3)
        protocol = self._noise.noise_protocol
        state = protocol.handshake_state
        symmetric = state.symmetric_state
        cipher = symmetric.cipher_state
        # A failed attempt has used up this much of the state. Noise has no word for trying several
        # keys, but what a message does to the state is in these values alone (section 5).
        before = (symmetric.h, symmetric.ck, cipher.k, cipher.n, tuple(state.message_patterns))
        for token in self._tokens:
            symmetric.h, symmetric.ck, key, number, patterns = before
            cipher.initialize_key(key)
            cipher.set_nonce(number)
            state.message_patterns = list(patterns)
            state.rs = None
            protocol.psks = [token]
            try:
                state.read_message(message, bytearray())
            except _LIBRARY_ERRORS:
                if state.rs is None:  # the key before the token didn't open either
                    raise _garbage() from None
                continue
            return _session(self._noise, state)
        raise HandshakeFailed("token", "the cluster tokens differ: compare `llamesh token` on both nodes")


def frame(message: bytes) -> bytes:
    """A handshake message with its length before it."""
    return _frame_length(len(message)) + bytes(message)


def rotation_proof(private: bytes, public: bytes, handshake_hash: bytes, role: Role) -> bytes:
    """32 bytes that only a holder of one of two private keys can make, for one handshake and one side.

    HMAC-SHA256 of a label, the role of who proves, and the handshake hash, under X25519(private,
    public). Who proves passes its previous private key and the other's static public key; who
    checks passes its own private key and the previous public key. Raises ValueError for a
    public key that leads to an all-zero secret.
    """
    secret = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    return hmac.digest(secret, _PROOF_LABEL + role.encode() + b" " + handshake_hash, hashlib.sha256)


def public_key(private: bytes) -> bytes:
    """The public half of an X25519 key."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def _connection(private: bytes, token: bytes, *, initiator: bool) -> Any:
    noise = NoiseConnection.from_name(_NAME)
    if initiator:
        noise.set_as_initiator()
    else:
        noise.set_as_responder()
    noise.set_prologue(PREAMBLE)
    noise.set_psks(token)
    noise.set_keypair_from_private_bytes(Keypair.STATIC, private)
    noise.start_handshake()
    return noise


def _session(noise: Any, state: Any) -> Session:
    """What the finished handshake agreed on; `state` was taken before the library dropped it."""
    protocol = noise.noise_protocol
    return Session(
        protocol.cipher_state_encrypt.k,
        protocol.cipher_state_decrypt.k,
        noise.get_handshake_hash(),
        state.rs.public_bytes,
    )


def _check_length(message: bytes, length: int) -> None:
    if len(message) != length:
        raise _garbage()


def _garbage() -> HandshakeFailed:
    return HandshakeFailed("garbage", "that is no llamesh handshake, or it was changed on its way")


__all__ = [
    "HINT_TOKEN", "HINT_VERSION", "MAGIC", "MESSAGE_1", "MESSAGE_2", "MESSAGE_3", "PREAMBLE", "WIRE_VERSION",
    "HandshakeFailed", "Initiator", "Reason", "RecordBroken", "Records", "Responder", "Role", "Session",
    "frame", "public_key", "rotation_proof",
]  # fmt: skip
