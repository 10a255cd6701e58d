"""Web pages at a node without keys: what the rules say, and that every lane keeps them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from llamesh.config.settings import Settings
from llamesh.errors import Forbidden
from llamesh.net.exchange import Headers
from llamesh.web.sites import Sites
from tests.web.raw import Http1, get, post
from tests.web.served import Served, served

EVIL = "evil.example:8080"
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
JSON = {"Content-Type": "application/json"}


def sites(**settings: Any) -> Sites:
    http = {key: settings.pop(key) for key in ("allowed_hosts", "cors_allowed_origins") if key in settings}
    return Sites(Settings.model_validate({"node_id": "Box-1.example", "http": http, **settings}))


def headers(host: str | None = "127.0.0.1:8080", **more: str) -> Headers:
    named = [] if host is None else [(b"host", host.encode())]
    return [*named, *((name.replace("_", "-").encode(), value.encode()) for name, value in more.items())]


def passes(check: Any, sent: Headers) -> bool:
    try:
        check(sent)
    except Forbidden:
        return False
    return True


# Names.


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("127.0.0.1:8080", True),
        ("192.168.1.7", True),
        ("[::1]:8080", True),
        ("[fe80::1]", True),
        ("LocalHost:8080", True),
        ("localhost.", True),
        ("box", True),
        ("node1:8080", True),
        ("box.local:8080", True),
        ("box.lan", True),
        ("host.docker.internal:8080", True),
        ("a.localhost", True),
        ("llamesh-0.llamesh.default.svc.cluster.local", True),
        ("box-1.EXAMPLE:8080", True),
        ("llm.example.org", True),
        ("llm.example.org.", True),
        ("gpu.intern.example", True),
        ("deep.gpu.intern.example:1", True),
        ("chat.example.net:9", True),
        ("evil.example:8080", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example", False),
        ("intern.example", False),
        ("evilintern.example", False),
        ("local", True),
        ("evil.notlocal", False),
        ("user@localhost", False),
        ("localhost:80:80", False),
        ("localhost/evil.example", False),
        ("[evil.example]", False),
        ("[::1", False),
        ("..", False),
        ("ev il", False),
        ("\u00e4.local", False),
        ("", True),  # no browser
    ],
)
def test_names(host: str, known: bool) -> None:
    rules = sites(
        public_url="https://LLM.example.org/x", allowed_hosts=["*.intern.example", "Chat.example.net"]
    )
    for check in (rules.check_shown, rules.check_private, rules.check_admin):
        assert passes(check, headers(host)) is known
    assert passes(rules.check, headers(host))
    assert passes(rules.check, headers(host, referer="http://x/")) is known


def test_the_machine_has_its_names() -> None:
    assert passes(sites().check_private, headers(f"{socket.gethostname()}:8080"))
    assert passes(sites(listen_addr="gpu.example.org:80").check_private, headers("gpu.example.org"))


def test_any_host() -> None:
    rules = sites(allowed_hosts=["*"])
    assert passes(rules.check_private, headers("evil.example"))
    assert not passes(rules.check_admin, headers("evil.example", origin="http://other.example"))


def test_every_host_that_is_said_must_be_known() -> None:
    assert not passes(sites().check_private, [*headers(), (b"host", b"evil.example")])
    assert passes(sites().check_private, headers(None))


def test_a_refusal_says_what_to_set() -> None:
    with pytest.raises(Forbidden, match=r"'evil\.example:8080'.*http\.allowed_hosts.*auth\.enabled"):
        sites().check_private(headers(EVIL))
    with pytest.raises(Forbidden) as caught:
        sites().check_private(headers("x" * 9000 + ".example"))
    assert len(caught.value.message) < 400


# Who is a web page, and whose.


@pytest.mark.parametrize(
    ("said", "page"),
    [
        ({"origin": "http://evil.example:8080"}, True),
        ({"referer": "http://evil.example:8080/x"}, True),
        ({"sec_fetch_site": "same-origin"}, True),
        ({"sec_fetch_site": "none"}, False),
        ({"sec_fetch_mode": "cors", "accept_language": "*"}, False),  # Node.js
        ({"user_agent": "curl/8"}, False),
    ],
)
def test_what_any_program_may_ask_pages_may_not_by_any_name(said: dict[str, str], page: bool) -> None:
    assert passes(sites().check, headers(EVIL, **said)) is not page
    assert passes(sites().check, headers("box:8080", **said))


@pytest.mark.parametrize(
    ("origin", "allowed", "seen", "administered"),
    [
        ("http://127.0.0.1:8080", (), True, True),
        ("https://127.0.0.1:8080", (), True, True),  # TLS ends at a proxy
        ("https://llm.example.org", (), True, True),
        ("http://llm.example.org", (), False, False),
        ("http://127.0.0.1:9090", (), False, False),
        ("http://localhost:8080", (), False, False),
        ("https://evil.example", (), False, False),
        ("null", (), False, False),
        ("", (), False, False),
        ("https://chat.example", ("https://Chat.example",), True, True),
        ("https://chat.example.evil.example", ("https://chat.example",), False, False),
        ("https://evil.example", ("*",), True, False),
    ],
)
def test_origins(origin: str, allowed: tuple[str, ...], seen: bool, administered: bool) -> None:
    rules = sites(public_url="https://llm.example.org", cors_allowed_origins=list(allowed))
    assert passes(rules.check_private, headers(origin=origin)) is seen
    assert passes(rules.check_admin, headers(origin=origin)) is administered
    assert passes(rules.check_posted, headers(origin=origin)) is seen
    assert passes(rules.check_posted, headers(origin=origin, content_type="application/json"))


def test_two_origins_are_one_too_many() -> None:
    rules = sites(cors_allowed_origins=["https://chat.example"])
    said = [*headers(origin="https://chat.example"), (b"origin", b"https://evil.example")]
    assert not passes(rules.check_private, said)
    assert not passes(rules.check_admin, said)


def test_an_allowed_origin_may_know_the_node_by_any_name() -> None:
    rules = sites(cors_allowed_origins=["https://chat.example"])
    sent = headers("gpu1.example", origin="https://chat.example", sec_fetch_site="cross-site")
    for check in (rules.check, rules.check_private, rules.check_admin, rules.check_keyed):
        assert passes(check, sent)


@pytest.mark.parametrize(
    ("site", "navigates", "seen", "administered", "keyed"),
    [
        ("same-origin", False, True, True, True),
        ("none", True, True, True, True),
        ("same-site", False, False, False, True),
        ("cross-site", False, False, False, False),
        ("cross-site", True, True, False, False),
    ],
)
def test_what_the_browser_says_of_the_site(
    site: str, navigates: bool, seen: bool, administered: bool, keyed: bool
) -> None:
    way = {"sec_fetch_mode": "navigate", "sec_fetch_dest": "document"} if navigates else {}
    sent, rules = headers(sec_fetch_site=site, **way), sites()
    assert passes(rules.check_private, sent) is seen
    assert passes(rules.check_admin, sent) is administered
    assert passes(rules.check_keyed, sent) is keyed
    assert passes(rules.check_shown, sent)


@pytest.mark.parametrize(
    "kind", ["text/plain;charset=UTF-8", "multipart/form-data; boundary=x", "", " Text/Plain", None]
)
def test_a_post_that_a_browser_sends_unasked(kind: str | None) -> None:
    typed = {} if kind is None else {"content_type": kind}
    assert not passes(sites().check_posted, headers(origin="https://evil.example", **typed))
    assert passes(sites().check_posted, headers(**typed))


def test_a_key_that_a_browser_sends_by_itself() -> None:
    check = sites(public_url="https://llm.example.org").check_carried
    assert passes(check, headers())
    assert passes(check, headers(origin="http://127.0.0.1:8080"))
    assert passes(check, headers(origin="https://llm.example.org"))
    assert not passes(check, headers(origin="https://evil.example"))


# All lanes.

PRIVATE = (
    *("/api/v1/state", "/api/v1/requests", "/api/v1/requests/x", "/api/v1/events", "/api/v1/state/stream"),
    *("/logs/stream", "/", "/ui/", "/ui/static/app.js", "/props?model=m", "/upstream/m/health"),
)
READ = ("/v1/models", "/v1/models/m", "/metrics", "/metrics/json", "/cluster/nodes", "/running")
OPEN = ("/health", "/healthz", "/readyz", "/version")


@pytest.mark.parametrize("path", PRIVATE)
def test_a_rebound_name_sees_nothing(node: Served, lane: str, path: str) -> None:
    reply = node.ask(lane, None, path, {}, "GET", host=EVIL)
    assert (reply.status, reply.error["type"]) == (403, "forbidden")
    assert "http.allowed_hosts" in reply.error["message"]


@pytest.mark.parametrize("path", READ)
def test_programs_may_know_the_node_by_any_name(node: Served, lane: str, path: str) -> None:
    assert node.ask(lane, None, path, {}, "GET", host="gpu1.example.org:8080").status == 200
    reply = node.ask(lane, None, path, {"Referer": f"http://{EVIL}/"}, "GET", host=EVIL)
    assert (reply.status, reply.error["type"]) == (403, "forbidden")


@pytest.mark.parametrize("path", OPEN)
def test_health_is_for_all(node: Served, lane: str, path: str) -> None:
    assert node.ask(lane, None, path, {"Origin": f"http://{EVIL}"}, "GET", host=EVIL).status == 200


def test_inference_by_any_name_but_not_for_its_pages(node: Served, lane: str) -> None:
    undici = {**JSON, "Sec-Fetch-Mode": "cors", "Accept-Language": "*", "User-Agent": "node"}
    for sent in (JSON, {}, undici):
        assert node.ask(lane, CHAT, headers=sent, host="gpu1.example.org").status == 200
    for more in (
        {"Origin": f"http://{EVIL}"},
        {"Sec-Fetch-Site": "same-origin"},
        {"Referer": f"http://{EVIL}/"},
    ):
        reply = node.ask(lane, CHAT, headers={**JSON, **more}, host=EVIL)
        assert (reply.status, reply.error["type"]) == (403, "forbidden")


def test_a_cross_site_post(node: Served, lane: str) -> None:
    """A form or a script of another site, as a browser sends it without asking."""
    evil = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
    for kind in (
        "text/plain;charset=UTF-8",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=b",
    ):
        reply = node.ask(lane, CHAT, headers={**evil, "Content-Type": kind})
        assert (reply.status, reply.error["type"]) == (403, "forbidden"), kind
    for path in ("/admin/unload", "/admin/drain", "/admin/pause", "/admin/reload", "/models/load"):
        reply = node.ask(lane, {"model": "spare"}, path, {**evil, "Content-Type": "text/plain"})
        assert (reply.status, reply.error["type"]) == (403, "forbidden"), path
    assert node.ask(lane, None, "/readyz", {}, "GET").json()["status"] == "ready"


@pytest.mark.parametrize(
    ("said", "status"),
    [
        ({}, 200),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Origin": "http://localhost:3000"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_other_sites_do_not_see_the_state(node: Served, lane: str, said: dict[str, str], status: int) -> None:
    reply = node.ask(lane, None, "/api/v1/state", said, "GET", host="localhost:8080")
    assert reply.status == status


def test_unloading_by_a_rebound_link(node: Served) -> None:
    # By the machine's own name, which may lead to loopback, browsers don't say which site asks.
    for host, status in ((EVIL, 403), ("box:8080", 403), ("127.0.0.1", 200), ("LOCALHOST.:8080", 200)):
        with Http1(node.port) as client:
            client.send(get("/unload", host=host))
            assert client.answer().status == status


@pytest.mark.parametrize(
    ("host", "may"),
    [
        ("localhost:8080", True),
        ("a.localhost", True),
        ("127.0.1.1:8080", True),
        ("[::1]:8080", True),
        (None, True),
        ("", True),
        ("box-1.example", False),
        ("192.168.1.7:8080", False),
        ("[fe80::1]", False),
        ("localhost.evil.example", False),
        ("user@localhost", False),
    ],
)
def test_acts_by_get_need_a_name_at_which_browsers_tell_who_asks(host: str | None, may: bool) -> None:
    assert passes(sites().check_by_get, headers(host)) is may


@pytest.mark.parametrize("lines", [[], ["Host: x", "Host: evil.example"], ["Host: x", "Host: x"]])
def test_exactly_one_host(node: Served, lines: list[str]) -> None:
    for path in ("/api/v1/state", "/v1/models"):
        with Http1(node.port) as client:
            client.send(get(path, *lines, host=None))
            assert client.answer().status == 400
    with Http1(node.port) as client:
        client.send(get("/api/v1/state", version="1.0", host=None))
        assert client.answer().status == 200


# With other settings.


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One with a name, and with pages that may use it."""
    config = {
        "public_url": "https://llm.example.org",
        "http": {"cors_allowed_origins": ["https://chat.example.org"], "allowed_hosts": ["*.intern.example"]},
    }
    with served(tmp_path_factory.mktemp("named"), {"m": {"slots": 2}}, config) as running:
        yield running


@pytest.mark.parametrize("host", ["llm.example.org", "gpu.intern.example:8080"])
def test_names_that_were_given(named: Served, lane: str, host: str) -> None:
    assert named.ask(lane, None, "/api/v1/state", {}, "GET", host=host).status == 200
    sent = {**JSON, "Origin": f"https://{host}", "Sec-Fetch-Site": "same-origin"}
    assert named.ask(lane, CHAT, headers=sent, host=host).status == 200
    assert named.ask(lane, {}, "/admin/undrain", sent, host=host).status == 200
    assert named.ask(lane, None, "/api/v1/state", {}, "GET", host=EVIL).status == 403


def test_pages_that_were_allowed_by_any_name_they_know(named: Served, lane: str) -> None:
    sent = {"Origin": "https://chat.example.org", "Sec-Fetch-Site": "cross-site"}
    for path in ("/api/v1/state", "/v1/models", "/metrics/json"):
        reply = named.ask(lane, None, path, sent, "GET", host="gpu1.example")
        assert reply.status == 200
        assert reply.headers["access-control-allow-origin"] == "https://chat.example.org"
    for kind in ("application/json", "text/plain"):
        reply = named.ask(lane, CHAT, headers={**sent, "Content-Type": kind}, host="gpu1.example")
        assert reply.status == 200


def test_keys_are_enough(guarded: Served, lane: str) -> None:
    key = {"X-Node-Key": "plain-key", "Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
    assert guarded.ask(lane, CHAT, headers=key, host=EVIL).status == 200
    for path in ("/api/v1/state", "/v1/models", "/ui/"):
        assert guarded.ask(lane, None, path, key, "GET", host=EVIL).status == 200


def test_an_administrators_key_from_another_site(guarded: Served, lane: str) -> None:
    admin = {"X-Node-Key": "admin-key"}
    for said, status in (
        ({"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "https://chat.example.org"}, 200),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "https://proxied.example"}, 200),
    ):
        assert guarded.ask(lane, {}, "/admin/undrain", admin | said, host="proxied.example").status == status


def test_a_remembered_password_from_another_site(guarded: Served) -> None:
    basic = "Authorization: Basic eDphZG1pbi1rZXk="  # x:admin-key
    for origin, status in (("http://x", 200), ("https://evil.example", 403)):
        with Http1(guarded.port) as client:
            client.send(post({"model": "m"}, "/upstream/m/tokenize", basic, f"Origin: {origin}"))
            assert client.answer().status == status
