"""Finding an engine among real files and scripts, and the arguments and environment that it is given."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

import llamesh
from llamesh.config.cookbook import FromArguments, HubFile, ModelPath, Profile
from llamesh.local.launch import (
    BadArguments,
    Engine,
    EngineNotFound,
    Launch,
    build_launch,
    child_environment,
    find_engine,
    fixed_port,
    redacted,
)
from llamesh.local.process import Child, Platform, group_members, has_ended

PLATFORMS = {"detected": Platform.detect(), "plain": Platform()}
DEFAULT_SOURCE = ModelPath("/models/a b.gguf")
HELP = """\
----- common params -----
-h,    --help, --usage                  print usage and exit
-c,    --ctx-size N                     size of the prompt context; see --rope-scaling
                                        --not-a-flag at the start of a text
{fit}--host HOST                             ip address to listen on
--port PORT                             port to listen (default: 8080)
--models-autoload, --no-models-autoload
                                        whether to load
"""


@pytest.fixture(params=PLATFORMS)
def platform(request: pytest.FixtureRequest) -> Platform:
    name: str = request.param
    return PLATFORMS[name]


def profile(*arguments: str, source: ModelPath | HubFile | FromArguments = DEFAULT_SOURCE) -> Profile:
    return Profile(
        model="qwen", id="small", model_description="", description="", source=source, arguments=arguments
    )


def launch(*arguments: str, engine: Engine | None = None) -> Launch:
    return build_launch(profile(*arguments), engine, host="127.0.0.1", port=4001)


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


class TestFindEngine:
    async def find(self, path: Path, platform: Platform, *, seconds: float = 60, search: str = "") -> Engine:
        environ = {"PATH": search or "/nowhere"}
        default = Path("./default/llama-server")
        return await find_engine(
            path, default_path=default, environ=environ, ask_seconds=seconds, platform=platform
        )

    async def test_the_configured_binary(self, tmp_path: Path, platform: Platform) -> None:
        (tmp_path / "help").write_text(HELP.format(fit="-fit,  --fit [on|off]     whether to\n"))
        binary = script(
            tmp_path / "server",
            f"""case "$1" in
            --version) echo 'version: 5678 (abc123)' >&2; echo 'built with GNU 12.2.0' >&2 ;;
            --help) exec /bin/cat '{tmp_path}/help' ;;
            esac""",
        )
        engine = await self.find(binary, platform)
        assert engine.command == (str(binary),)
        assert engine.origin == "configured"
        assert engine.version == "5678 (abc123)"
        assert engine.flags == {
            *("-h", "--help", "--usage", "-c", "--ctx-size", "-fit", "--fit", "--host", "--port"),
            *("--models-autoload", "--no-models-autoload"),
        }

    async def test_a_relative_path_becomes_absolute(
        self, tmp_path: Path, platform: Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        script(tmp_path / "bin" / "server", "exit 0")
        monkeypatch.chdir(tmp_path)
        engine = await self.find(Path("bin/server"), platform)
        assert engine.command == (str(tmp_path / "bin" / "server"),)

    async def test_a_wrapper_that_knows_no_flags(self, tmp_path: Path, platform: Platform) -> None:
        binary = script(tmp_path / "server", "echo what is $1; exit 2")
        engine = await self.find(binary, platform)
        assert engine == Engine((str(binary),), "configured", "unknown")

    async def test_a_wrappers_own_help_is_no_list_of_flags(self, tmp_path: Path, platform: Platform) -> None:
        binary = script(tmp_path / "server", "echo '--gpu N    which GPU'; echo '--port N  where'")
        assert (await self.find(binary, platform)).flags == frozenset()

    async def test_a_wrapper_that_starts_for_real_is_killed_with_its_group(
        self, tmp_path: Path, platform: Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        binary = script(tmp_path / "server", "/bin/sleep 1000 & wait")
        started: list[Child] = []
        spawn = Child.spawn

        def note(*arguments: Any, **options: Any) -> Child:
            started.append(spawn(*arguments, **options))
            return started[-1]

        monkeypatch.setattr(Child, "spawn", note)
        with trio.fail_after(60):
            engine = await self.find(binary, platform, seconds=0.2)
            assert engine == Engine((str(binary),), "configured", "unknown")
        # Not asked a second time.
        [child] = started
        assert [member for member in group_members(child.pid) if not has_ended(member)] == []

    async def test_a_configured_binary_that_is_not_there(self, tmp_path: Path, platform: Platform) -> None:
        with pytest.raises(EngineNotFound, match=r"llama_cpp\.binary_path .*missing does not exist"):
            await self.find(tmp_path / "missing", platform)

    async def test_a_configured_file_that_is_no_program(self, tmp_path: Path, platform: Platform) -> None:
        file = script(tmp_path / "server", "exit 0")
        file.chmod(0o644)
        with pytest.raises(EngineNotFound, match="not an executable file"):
            await self.find(file, platform)
        with pytest.raises(EngineNotFound, match="not an executable file"):
            await self.find(tmp_path, platform)

    async def test_one_on_path(self, tmp_path: Path, platform: Platform) -> None:
        binary = script(tmp_path / "llama-server", "echo 'version: 0.6.0-dev (build 0, commit unknown)'")
        engine = await self.find(Path("./default/llama-server"), platform, search=f"/nowhere:{tmp_path}")
        assert engine == Engine((str(binary),), "path", "0.6.0-dev (build 0, commit unknown)")

    async def test_the_default_place_comes_before_path(
        self, tmp_path: Path, platform: Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        script(tmp_path / "llama-server", "exit 0")
        built = script(tmp_path / "default" / "llama-server", "exit 0")
        monkeypatch.chdir(tmp_path)
        engine = await self.find(Path("./default/llama-server"), platform, search=str(tmp_path))
        assert engine == Engine((str(built),), "configured", "unknown")

    async def test_the_embedded_one_else(self, platform: Platform) -> None:
        engine = await self.find(Path("./default/llama-server"), platform)
        assert engine.command[:2] == (sys.executable, "-P")
        assert engine.origin == "embedded"
        assert engine.version == importlib.metadata.version("xllamacpp")
        assert engine.flags == frozenset()

    async def test_none_at_all(self, platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
        def version(name: str) -> str:
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib.metadata, "version", version)
        with pytest.raises(EngineNotFound, match="there is no engine"):
            await self.find(Path("./default/llama-server"), platform)

    async def test_the_node_s_secrets_are_not_shown_to_it(self, tmp_path: Path, platform: Platform) -> None:
        binary = script(tmp_path / "server", 'echo "version: ${CLUSTER_TOKEN:-none}"')
        environ = {"PATH": os.defpath, "CLUSTER_TOKEN": "secret"}
        engine = await find_engine(binary, environ=environ, platform=platform)
        assert engine.version == "none"


async def test_the_working_directory_can_not_shadow_the_embedded_engine(tmp_path: Path) -> None:
    (tmp_path / "llamesh").mkdir()
    (tmp_path / "llamesh" / "__init__.py").write_text("raise SystemExit('shadowed')")
    engine = await find_engine(Path("x"), default_path=Path("x"), environ={"PATH": "/nowhere"})
    # Another module of the same package: it runs to its end at once.
    command = [part.replace("llamesh.local.engine", "llamesh.errors") for part in engine.command]
    assert command != list(engine.command)
    child = Child.spawn([*command, "--flag"], env={"PATH": os.defpath}, cwd=tmp_path)
    assert await child.run() == 0, child.tail.lines()


async def test_an_installed_package_is_started_as_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(Path(llamesh.__file__).resolve().parents[1])
    monkeypatch.setattr(sysconfig, "get_path", lambda name: root)
    engine = await find_engine(Path("x"), default_path=Path("x"), environ={"PATH": "/nowhere"})
    assert engine.command == (sys.executable, "-P", "-m", "llamesh.local.engine")


class TestArguments:
    def test_the_source_comes_first_then_the_profiles_own_then_what_is_missing(self) -> None:
        assert launch("-ngl", "99", "--jinja") == Launch(
            (
                *("-m", "/models/a b.gguf", "-ngl", "99", "--jinja"),
                *("-c", "0", "--fit", "off", "--host", "127.0.0.1", "--port", "4001"),
            ),
            "127.0.0.1",
            4001,
        )

    @pytest.mark.parametrize(
        ("source", "expected"),
        [
            (ModelPath("m.gguf"), ["-m", "m.gguf"]),
            (HubFile("org/repo:Q8_0", None), ["--hf-repo", "org/repo:Q8_0"]),
            (HubFile("org/repo", "a.gguf"), ["--hf-repo", "org/repo", "--hf-file", "a.gguf"]),
            (FromArguments("-mu", "http://127.0.0.1/m.gguf"), []),
        ],
    )
    def test_each_source_has_its_flag(
        self, source: ModelPath | HubFile | FromArguments, expected: Sequence[str]
    ) -> None:
        own = ("-mu", "http://127.0.0.1/m.gguf") if isinstance(source, FromArguments) else ()
        built = build_launch(profile(*own, source=source), host="127.0.0.1", port=4001)
        assert built.arguments[: len(expected) + len(own) + 1] == (*expected, *own, "-c")

    @pytest.mark.parametrize(
        ("given", "left_out"),
        [
            (("-c", "4096"), "-c"),
            (("--ctx-size", "4096"), "-c"),
            (("--ctx_size", "4096"), "-c"),
            (("--ctx-size=4096",), "-c"),
            (("-fit", "on"), "--fit"),
            (("--fit", "on"), "--fit"),
            (("--host", "127.0.0.2"), "--host"),
            (("--port", "5000"), "--port"),
            (("--port=5000",), "--port"),
        ],
    )
    def test_what_the_profile_gives_is_not_added(self, given: tuple[str, ...], left_out: str) -> None:
        built = launch(*given)
        added = {"-c": "0", "--fit": "off", "--host": "127.0.0.1", "--port": "4001"}
        del added[left_out]
        expected = [word for pair in added.items() for word in pair]
        assert built.arguments == ("-m", "/models/a b.gguf", *given, *expected)

    def test_similar_flags_are_others(self) -> None:
        built = launch("-ctk", "q8_0", "--fit-target", "512", "-fitc", "4096", "--reuse-port")
        assert built.arguments[-8:] == (
            *("-c", "0", "--fit", "off"),
            *("--host", "127.0.0.1", "--port", "4001"),
        )

    @pytest.mark.parametrize(
        ("given", "host", "port"),
        [
            (("--port", "5000"), "127.0.0.1", 5000),
            (("--port", "5000", "--port", "5001"), "127.0.0.1", 5001),
            (("--port=5000",), "127.0.0.1", 5000),
            (("--host", "127.0.0.2"), "127.0.0.2", 4001),
            (("--host", "0.0.0.0"), "127.0.0.1", 4001),
            (("--host", "::"), "::1", 4001),
            (("--host", "127.0.0.3,192.0.2.1"), "127.0.0.3", 4001),
            (("--host", "localhost", "--port", "1"), "localhost", 1),
        ],
    )
    def test_a_given_address_is_the_one_to_ask(self, given: Sequence[str], host: str, port: int) -> None:
        built = launch(*given)
        assert (built.host, built.port) == (host, port)
        fixed = any(word.startswith("--port") for word in given)
        assert fixed_port(profile(*given)) == (port if fixed else None)

    @pytest.mark.parametrize(
        "given",
        [
            *[("--port", bad) for bad in ("0", "65536", "100000", "00000080", "-1", "http", "", "²", "٤")],
            ("--port",),
            ("--port=",),
            ("--host", "/run/llama.sock"),
            ("--host", ""),
            ("--host",),
        ],
    )
    def test_an_address_that_can_not_be_asked_is_refused(self, given: Sequence[str]) -> None:
        with pytest.raises(BadArguments, match=rf"qwen:small: {given[0][:6]}"):
            launch(*given)
        assert fixed_port(profile(*given)) is None

    def test_fit_is_left_out_only_for_an_engine_known_to_lack_it(self) -> None:
        old = Engine(("server",), "configured", "1", frozenset({"--host", "--port", "--ctx-size"}))
        new = Engine(("server",), "configured", "2", old.flags | {"-fit", "--fit"})
        unknown = Engine(("server",), "configured", "unknown")
        assert "--fit" not in launch(engine=old).arguments
        assert "--fit" in launch(engine=new).arguments
        assert "--fit" in launch(engine=unknown).arguments
        assert launch("--fit", "on", engine=old).arguments.count("--fit") == 1

    def test_repr_hides_keys(self) -> None:
        built = launch("--api-key", "s3cret", "--hf-token=s3cret")
        assert "s3cret" not in repr(built)
        assert "--port 4001" in repr(built)


FLAGS = {
    "context": ("-c", "--ctx-size", "--ctx_size"),
    "fit": ("-fit", "--fit"),
    "host": ("--host",),
    "port": ("--port",),
}
VALUES = {"context": "512", "fit": "on", "host": "127.0.0.5", "port": "6000"}
OTHERS = [("-ngl", "99"), ("--jinja",), ("-np", "2"), ("--alias", "x y"), ("--temp", "-1"), ("-ctk", "q8_0")]
SOURCES = st.sampled_from([ModelPath("m.gguf"), HubFile("o/r", None), HubFile("o/r", "f.gguf")])


@st.composite
def own_arguments(draw: st.DrawFn) -> tuple[list[str], set[str]]:
    """A profile's own arguments, and which of the four kinds are among them; each kind at most once."""
    groups = [list(other) for other in draw(st.lists(st.sampled_from(OTHERS), max_size=6))]
    kinds = draw(st.sets(st.sampled_from(sorted(FLAGS))))
    for kind in sorted(kinds):
        flag = draw(st.sampled_from(FLAGS[kind]))
        joined = flag.startswith("--") and draw(st.booleans())
        groups.append([f"{flag}={VALUES[kind]}"] if joined else [flag, VALUES[kind]])
    return [word for group in draw(st.permutations(groups)) for word in group], kinds


@settings(deadline=None)
@given(own_arguments(), SOURCES, st.integers(1, 65535))
def test_arguments_keep_their_order_and_no_flag_comes_twice(
    own: tuple[list[str], set[str]], source: ModelPath | HubFile, port: int
) -> None:
    words, kinds = own
    built = build_launch(profile(*words, source=source), host="127.0.0.1", port=port)
    arguments = list(built.arguments)
    head = arguments.index(words[0]) if words else arguments.index("-c")
    assert arguments[head : head + len(words)] == words
    names = [word.partition("=")[0] for word in arguments]
    for kind, spellings in FLAGS.items():
        assert sum(name in spellings for name in names) == 1, kind
    assert sum(name in ("-m", "--hf-repo") for name in names) == 1
    assert built.port == (6000 if "port" in kinds else port)
    assert built.host == ("127.0.0.5" if "host" in kinds else "127.0.0.1")


class TestEnvironment:
    def test_the_key_goes_into_the_environment(self) -> None:
        base = {"PATH": "/bin", "LLAMA_API_KEY": "of the user"}
        assert child_environment(base, api_key="k") == {"PATH": "/bin", "LLAMA_API_KEY": "k"}
        assert child_environment(base, api_key="") == {"PATH": "/bin"}
        assert base["LLAMA_API_KEY"] == "of the user"

    def test_what_would_redirect_it_or_is_secret_stays_here(self) -> None:
        base = {
            "CLUSTER_TOKEN": "t",
            "NODE_PRIVATE_KEY": "k",
            "LLAMESH_AUTH__ALLOWED_KEYS": "[k]",
            "LLAMA_ARG_HOST": "0.0.0.0",
            "LLAMA_ARG_PORT": "1",
            "LLAMA_ARG_MODEL": "m",
            "LLAMA_ARG_SSL_CERT_FILE": "c",
            "LLAMA_SERVER_CHILD_MODE": "1",
            "AIP_MODE": "PREDICTION",
        }
        assert child_environment(base, api_key="") == {}

    def test_what_tunes_it_goes_along(self) -> None:
        base = {"CUDA_VISIBLE_DEVICES": "1", "HF_TOKEN": "t", "LLAMA_ARG_THREADS": "4", "LLAMESHED": "x"}
        assert child_environment(base, api_key="") == base


def test_shown_arguments_have_no_keys() -> None:
    arguments = ["--api-key", "a", "--api_key=b", "-hft", "c", "--alias", "--api", "--hf-token"]
    assert redacted(arguments) == [
        *("--api-key", "***", "--api_key=***", "-hft", "***"),
        *("--alias", "--api", "--hf-token"),
    ]


async def test_the_real_binary(llama_server: Path) -> None:
    engine = await find_engine(llama_server)
    assert engine.origin == "configured"
    assert engine.version != "unknown"
    assert {"-c", "--ctx-size", "-fit", "--fit", "--host", "--port", "-m", "--hf-repo"} <= engine.flags
