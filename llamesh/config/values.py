"""The kinds of values that the files hold, each with the words for what is wrong with another."""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from llamesh.config.problems import Finding, shown

# Beyond it JSON readers lose digits; no count, size or duration here comes near.
_LARGEST = 2**53
_NODE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LABELS = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9_-]{1,63}(?<!-))*\.?")


def reject(message: str, hint: str) -> PydanticCustomError:
    """The error to raise in a validator: what is wrong, and what would be right."""
    return reject_all([Finding((), message, hint)])


def reject_all(findings: Iterable[Finding]) -> PydanticCustomError:
    """Several at once, each at its own path below the value that is validated."""
    return PydanticCustomError("llamesh", "refused", {"findings": list(findings)})


class Section(BaseModel):
    """A mapping of known keys. A key without a value means its default, so a section may be empty."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _without_blanks(cls, data: Any) -> Any:
        if data is None:
            return {}
        if isinstance(data, dict):
            return {
                key: value for key, value in data.items() if value is not None or key not in cls.model_fields
            }
        return data


@dataclass(frozen=True, slots=True)
class Address:
    """A host (name or IP address, without brackets) and a port; `str()` gives its text back."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read `ip:port`, `[ip6]:port` or `host:port`; ValueError says what is wrong with it."""
        host, colon, port = text.rpartition(":")
        if not colon:
            raise ValueError("has no port")
        if not port.isascii() or not port.isdigit() or len(port) > 5 or int(port) > 65535:
            raise ValueError("the port isn't a number from 0 to 65535")
        if not host:
            raise ValueError("has no host")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
            try:
                ipaddress.IPv6Address(host)
            except ValueError:
                raise ValueError("the brackets don't hold an IPv6 address") from None
        elif ":" in host:
            raise ValueError("an IPv6 address needs brackets")
        elif re.fullmatch(r"[0-9.]+", host):
            try:
                ipaddress.IPv4Address(host)
            except ValueError:
                raise ValueError("the host isn't an IPv4 address") from None
        elif len(host) > 253 or not _LABELS.fullmatch(host):
            raise ValueError("the host is neither a name nor an IP address")
        return cls(host, int(port))

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it (`localhost` counts; another name doesn't)."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host.lower().rstrip(".") == "localhost"


def _address(value: Any) -> Address:
    if isinstance(value, Address):
        return value
    if not isinstance(value, str):
        raise reject(f"not an address: {shown(value)}", "such as 127.0.0.1:8080 or [::1]:8080, in quotes")
    try:
        return Address.parse(value.strip())
    except ValueError as error:
        hint = "such as 127.0.0.1:8080, [::1]:8080 or name:8080; 0.0.0.0:8080 for every interface"
        raise reject(f"not an address: {shown(value)}: {error}", hint) from None


def peer_address(value: Any) -> Address:
    """Read where a peer listens: an address whose port isn't 0. Raises what `reject` makes."""
    address = _address(value)
    if address.port == 0:
        raise reject(f"port 0 in {shown(str(address))}", "the port that the peer listens on")
    return address


def is_node_id(text: str) -> bool:
    """Whether a node may be called so: 1 to 64 letters, digits, `.`, `_` or `-`."""
    return _NODE_ID.fullmatch(text) is not None


def node_id(value: str) -> str:
    """`value` itself when it is a node id. Raises what `reject` makes."""
    if not is_node_id(value):
        raise reject(f"not a node id: {shown(value)}", "1 to 64 letters, digits, `.`, `_` or `-`")
    return value


def _url(value: str) -> str:
    try:
        if "://" in value:
            parts = urlsplit(value)
            _ = parts.port  # raises when it isn't a port
            if parts.scheme in ("http", "https") and parts.hostname and not re.search(r"\s", value):
                return value.rstrip("/")
        elif Address.parse(value).port:
            return value
    except ValueError:
        pass
    raise reject(f"not an address for peers: {shown(value)}", "host:port, or http://host:port")


def _whole(value: Any) -> Any:
    # Python takes true for 1; a person who writes `max_hops: true` means something else.
    if isinstance(value, bool):
        raise reject(f"not a whole number: {shown(value)}", "a whole number")
    return value


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise reject(f"not a number: {shown(value)}", "a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise reject(f"not a finite number: {shown(value)}", "a number")
    return value


def _text(value: str) -> str:
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in value):
        raise reject("holds a control character", "text on one line")
    if not value or value != value.strip():
        raise reject("is empty or has blanks around it" if value else "is empty", "some text")
    return value


def _path(value: Any) -> Path:
    if isinstance(value, Path):
        return value
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise reject(f"not a path: {shown(value)}", "a path, such as ./folder/file or ~/folder")
    return user_path(value)


def user_path(text: str) -> Path:
    """A path with `~` replaced by the home directory, where there is one."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def listed(value: Any) -> Any:
    """One text where a list may stand: the environment's short form, `a,b`."""
    return (
        tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value
    )


Count = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=_LARGEST)]
Positive = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=_LARGEST)]
Port = Annotated[int, BeforeValidator(_whole), Field(ge=1, le=65535)]
Seconds = Annotated[float, BeforeValidator(_number), Field(ge=0, le=_LARGEST, allow_inf_nan=False)]
PositiveSeconds = Annotated[float, BeforeValidator(_number), Field(gt=0, le=_LARGEST, allow_inf_nan=False)]
Text = Annotated[str, AfterValidator(_text), WithJsonSchema({"type": "string", "minLength": 1})]
Url = Annotated[str, AfterValidator(_text), AfterValidator(_url)]
UserPath = Annotated[Path, PlainValidator(_path), WithJsonSchema({"type": "string", "minLength": 1})]
ListenAddress = Annotated[
    Address,
    PlainValidator(_address),
    PlainSerializer(str),
    WithJsonSchema({"type": "string", "pattern": r"^\s*(\[[0-9A-Fa-f:.]+\]|[^\s:\[\]]+):[0-9]{1,5}\s*$"}),
]
NodeId = Annotated[
    str, AfterValidator(node_id), WithJsonSchema({"type": "string", "pattern": f"^{_NODE_ID.pattern}$"})
]
TextOrList = Annotated[
    tuple[Text, ...],
    BeforeValidator(listed),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
                {"type": "string", "minLength": 1},
            ]
        }
    ),
]
