"""Which engine to start, and how: the binary, its arguments, its environment.

Flag spellings are those of llama-server's own parser (`common/arg.cpp` of llama.cpp, asked of b11434 with
`--help`): a value is the next argument, the last one wins where a flag is repeated, and in names that begin
with `--` an underscore counts as a hyphen.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import site
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import llamesh
from llamesh.config.cookbook import Elsewhere, FromArguments, HubFile, ModelPath, Profile, UrlFile
from llamesh.local.asking import ask, flags_in, version_in
from llamesh.local.builds.record import build_behind
from llamesh.local.process import Platform

__all__ = [
    "BadArguments",
    "Engine",
    "EngineNotFound",
    "Launch",
    "ask_version",
    "build_launch",
    "child_environment",
    "find_engine",
    "fixed_port",
    "redacted",
]

PROGRAM = "llama-server"
DEFAULT_BINARY_PATH = Path("./llama.cpp/bin/llama-server")
# A wrapper script may know neither --version nor --help and start for real: ask for so long, then kill it.
ASK_SECONDS = 2.0

_EMBEDDED_MODULE = "llamesh.local.engine"
_RUN_FROM_CHECKOUT = (
    "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); "
    f"runpy.run_module({_EMBEDDED_MODULE!r}, run_name='__main__', alter_sys=True)"
)

_CONTEXT = frozenset({"-c", "--ctx-size"})
_FIT = frozenset({"-fit", "--fit"})
_ALIAS = frozenset({"-a", "--alias"})
_HOST = frozenset({"--host"})
_PORT = frozenset({"--port"})
_SECRETS = frozenset({"--api-key", "--hf-token", "-hft"})

# What a child must not inherit, besides everything that begins with LLAMESH_.
_NOT_INHERITED = frozenset(
    {
        # Secrets of the node.
        "CLUSTER_TOKEN",
        "NODE_PRIVATE_KEY",
        # Where it listens and how it is asked is ours to say: another port, TLS, a path prefix, keys from a
        # file or a shared port would make it unreachable or reachable for others. AIP_MODE (a cloud's
        # convention that llama-server follows) replaces the port as well.
        "LLAMA_ARG_HOST",
        "LLAMA_ARG_PORT",
        "LLAMA_ARG_REUSE_PORT",
        "LLAMA_ARG_API_PREFIX",
        "LLAMA_ARG_API_KEY",
        "LLAMA_ARG_API_KEY_FILE",
        "LLAMA_ARG_SSL_KEY_FILE",
        "LLAMA_ARG_SSL_CERT_FILE",
        "AIP_MODE",
        # Which model, and for what, is the cookbook's to say.
        "LLAMA_ARG_MODEL",
        "LLAMA_ARG_MODEL_URL",
        "LLAMA_ARG_HF_REPO",
        "LLAMA_ARG_HF_FILE",
        "LLAMA_ARG_DOCKER_REPO",
        "LLAMA_ARG_MODELS_DIR",
        "LLAMA_ARG_MODELS_PRESET",
        "LLAMA_ARG_EMBEDDINGS",
        "LLAMA_ARG_RERANKING",
        # Set where we are ourselves under a llama-server router: a child that believes to belong to that one
        # exits at the end of its stdin, which is at once.
        "LLAMA_SERVER_ROUTER_PORT",
        "LLAMA_SERVER_CHILD_MODE",
    }
)


class EngineNotFound(Exception):
    """There is no engine to run, or not the one that was configured. The message says what to do."""


class BadArguments(ValueError):
    """The profile's own arguments put the child where we can't reach it. The message names the flag."""


@dataclass(frozen=True, slots=True)
class Engine:
    """The program behind every instance.

    `command` comes before the arguments; `version` is what it says of itself or "unknown"; `flags` are those
    its `--help` lists, empty when it can't be asked. `build` names the build of ours that it is, "" for
    none; `always`: arguments that it must be run with, whatever a profile says.
    """

    command: tuple[str, ...]
    origin: Literal["configured", "path", "embedded"]
    version: str
    flags: frozenset[str] = frozenset()
    build: str = ""
    always: tuple[str, ...] = ()

    @property
    def identity(self) -> str:
        """What tells it from another one that may behave otherwise: builds of one commit may differ."""
        return f"{self.version} {self.build}".strip()


@dataclass(frozen=True, slots=True)
class Launch:
    """What one instance is started with, and the address to reach it at. `repr` hides keys."""

    arguments: tuple[str, ...]
    host: str
    port: int

    def __repr__(self) -> str:
        return f"Launch({' '.join(redacted(self.arguments))!r}, host={self.host!r}, port={self.port})"


async def find_engine(
    binary_path: Path,
    *,
    default_path: Path = DEFAULT_BINARY_PATH,
    environ: Mapping[str, str] | None = None,
    ask_seconds: float = ASK_SECONDS,
    platform: Platform | None = None,
    will_be_built: bool = False,
) -> Engine:
    """The configured binary, else a `llama-server` on PATH, else the embedded engine.

    `binary_path` is llama_cpp.binary_path; when it isn't `default_path` somebody chose it, and then nothing
    else will do, unless it `will_be_built`. One that leads to a build of ours is that build, whatever the
    path leads to later. Runs the binary with `--version` and `--help`, each for `ask_seconds` at most; no
    answer is fine. Raises EngineNotFound.
    """
    environ = os.environ if environ is None else environ
    if binary_path.exists():
        if not binary_path.is_file() or not os.access(binary_path, os.X_OK):
            raise EngineNotFound(
                f"llama_cpp.binary_path {binary_path} is not an executable file: make it one (chmod +x) or "
                "name another"
            )
        if (ours := build_behind(binary_path)) is not None:
            build, program = ours
            engine = await _ask_engine("configured", str(program), environ, ask_seconds, platform)
            return replace(engine, build=build.key, always=build.always)
        # Absolute, since a child may be started in another directory.
        return await _ask_engine("configured", str(binary_path.absolute()), environ, ask_seconds, platform)
    if binary_path != default_path and not will_be_built:
        raise EngineNotFound(
            f"llama_cpp.binary_path {binary_path} does not exist: correct it, or leave it out to use a "
            f"{PROGRAM} on PATH or the embedded engine"
        )
    found = shutil.which(PROGRAM, path=environ.get("PATH", os.defpath))
    if found is not None:
        return await _ask_engine("path", os.path.abspath(found), environ, ask_seconds, platform)
    try:
        version = importlib.metadata.version("xllamacpp")
    except importlib.metadata.PackageNotFoundError:
        if will_be_built:
            # Starts of it fail and say so, until it is there.
            return Engine((str(binary_path.absolute()),), "configured", "unknown")
        raise EngineNotFound(
            f"there is no engine: {binary_path} does not exist, no {PROGRAM} is on PATH, and the embedded "
            "engine (Python package xllamacpp) is not installed"
        ) from None
    return Engine(_embedded_command(), "embedded", version)


def _embedded_command() -> tuple[str, ...]:
    """How to start `llamesh.local.engine` of this very package, whatever the working directory holds."""
    root = str(Path(llamesh.__file__).resolve().parents[1])
    # -P: a folder `llamesh` in the working directory must not be what the child imports.
    if root in (sysconfig.get_path("purelib"), site.getusersitepackages()):
        return (sys.executable, "-P", "-m", _EMBEDDED_MODULE)
    # In a checkout, -P would hide our own package as well: say where it is. Not by PYTHONPATH, which whatever
    # the engine starts would inherit.
    return (sys.executable, "-P", "-c", _RUN_FROM_CHECKOUT, root)


async def ask_version(program: Path, environ: Mapping[str, str]) -> str:
    """What a program says of itself, "unknown" where it doesn't."""
    return (await _ask_engine("configured", str(program), environ, ASK_SECONDS, None)).version


async def _ask_engine(
    origin: Literal["configured", "path"],
    program: str,
    environ: Mapping[str, str],
    seconds: float,
    platform: Platform | None,
) -> Engine:
    environment = child_environment(environ, api_key="")
    flags: frozenset[str] = frozenset()
    try:
        said, answered = await ask([program, "--version"], environment, seconds, platform)
        version = version_in(said)
        # One that didn't come back from the first question won't from the second.
        if answered:
            said, answered = await ask([program, "--help"], environment, seconds, platform)
            if answered:
                flags = flags_in(said)
    except OSError as problem:
        raise EngineNotFound(f"{program} can't be started: {problem}") from problem
    return Engine((program,), origin, version, flags)


def build_launch(
    profile: Profile,
    engine: Engine | None = None,
    *,
    host: str,
    port: int,
    context: int | None = None,
    on_cpu: bool = False,
) -> Launch:
    """The arguments for one instance of `profile`, in this order: source, the profile's own, what is missing.

    `-c 0` (the model's whole context), `--fit off` (no silent shrinking), `--host` and `--port` are added
    unless the profile has them; an address given by the profile is the one in the result. `--fit` is left
    out for an `engine` that is known not to have it. One that is known to have `--alias` is told the
    model's public name, so that answers carry that and not the path of a file. `context`: tokens, where
    the whole context doesn't fit and the profile names none. `on_cpu`: keep off the GPU, whatever the
    profile says. Raises BadArguments.
    """
    own = profile.arguments
    added: list[str] = []
    if _value_of(own, _CONTEXT) is None:
        added += ["-c", str(context or 0)]
    knows_fit = engine is None or not engine.flags or not engine.flags.isdisjoint(_FIT)
    if _value_of(own, _FIT) is None and knows_fit:
        added += ["--fit", "off"]
    if _value_of(own, _ALIAS) is None and _takes_alias(engine):
        added += ["--alias", profile.public_name]
    if on_cpu:
        # --gpu-layers 0 alone would still compute large batches there.
        added += ["--gpu-layers", "0", "--device", "none"]
    given_host = _value_of(own, _HOST)
    if given_host is None:
        added += ["--host", host]
    else:
        host = _reachable(given_host, profile)
    given_port = _value_of(own, _PORT)
    if given_port is None:
        added += ["--port", str(port)]
    else:
        number = _port_number(given_port)
        if number is None:
            raise BadArguments(f"{profile.key}: --port needs a number from 1 to 65535, not {given_port!r}")
        port = number
    if engine is not None:
        added += engine.always  # the last one of a flag counts
    return Launch((*source_arguments(profile), *own, *added), host, port)


def _takes_alias(engine: Engine | None) -> bool:
    return engine is not None and (engine.origin == "embedded" or not engine.flags.isdisjoint(_ALIAS))


def fixed_port(profile: Profile) -> int | None:
    """The port that the profile's own arguments name: it can't have more than one instance then.

    None where there is none, or one that `build_launch` will refuse.
    """
    given = _value_of(profile.arguments, _PORT)
    return None if given is None else _port_number(given)


def child_environment(base: Mapping[str, str], *, api_key: str) -> dict[str, str]:
    """The environment of a child: `base` without our secrets and without what would redirect it.

    Of the node's environment the child keeps PATH, CUDA_VISIBLE_DEVICES, HF_TOKEN and the like, and those
    LLAMA_ARG_* that tune rather than redirect. `api_key` ("" for none) is what it will ask of its callers: in
    the environment, since arguments show in the process list.
    """
    kept = {
        name: value
        for name, value in base.items()
        if name not in _NOT_INHERITED and not name.startswith("LLAMESH_")
    }
    kept.pop("LLAMA_API_KEY", None)
    if api_key:
        kept["LLAMA_API_KEY"] = api_key
    return kept


def redacted(arguments: Sequence[str]) -> list[str]:
    """`arguments` as they may be shown or logged: the values of key and token flags replaced by `***`."""
    shown: list[str] = []
    hide_next = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if hide_next:
            shown.append("***")
            hide_next = False
        elif _canonical(name) in _SECRETS:
            shown.append(f"{name}=***" if equals else argument)
            hide_next = not equals
        else:
            shown.append(argument)
    return shown


def source_arguments(profile: Profile) -> tuple[str, ...]:
    match profile.source:
        case ModelPath(path):
            return ("-m", path)
        case HubFile(repo, file):
            return ("--hf-repo", repo) if file is None else ("--hf-repo", repo, "--hf-file", file)
        case UrlFile(url):
            return ("--model-url", url)
        case FromArguments():
            return ()  # It stands among the profile's own arguments.
        case Elsewhere():
            raise BadArguments(f"{profile.key} isn't in the cookbook of this node")


def _canonical(name: str) -> str:
    return name.replace("_", "-") if name.startswith("--") else name


def _value_of(arguments: Sequence[str], spellings: frozenset[str]) -> str | None:
    """The value of the last of `spellings`, "" where it lacks one, None where the flag isn't there.

    `--flag=value` counts too: llama-server refuses it, in its own words, but a wrapper may take it.
    """
    found: str | None = None
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if _canonical(name) in spellings:
            found = value if equals else "".join(arguments[index + 1 : index + 2])
    return found


def _port_number(text: str) -> int | None:
    # Not 0: the child would choose, and nobody would know what.
    if not (text.isascii() and text.isdecimal() and len(text) <= 5):
        return None
    return int(text) if 0 < int(text) < 65536 else None


def _reachable(given: str, profile: Profile) -> str:
    """The address to connect to for a `--host`, which may list several and name "all addresses"."""
    first = given.split(",")[0].strip()
    if not first or first.endswith(".sock"):
        raise BadArguments(f"{profile.key}: --host needs an IP address or a host name, not {given!r}")
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(first, first)
