"""llama-swap's YAML as recipes.

The file has `models`, a mapping of ids to commands with macros (`${PORT}`, `${MODEL_ID}`, `${name}`,
`${env.NAME}`), and settings of a proxy around them. Commands that aren't llama-server's can't be taken
over: llamesh starts that one program.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

from llamesh.commands.convert.flags import settle_sources, take_arguments
from llamesh.commands.convert.recipe import Converted, Recipe, split_name

_MACRO = re.compile(r"\$\{([^{}$]{1,128})\}")
_PORT = "PORT"
_MOST_ROUNDS = 16
_LONGEST = 64 * 1024

# By llama-swap's own documentation: the least it waits for a start, and how long unless told otherwise.
_LEAST_START, _USUAL_START = 15, 120

_WRAPPERS = frozenset(
    {
        *("sh", "bash", "zsh", "dash", "fish", "cmd", "powershell", "docker", "podman", "nerdctl"),
        *("numactl", "taskset", "nice", "ionice", "sudo", "systemd-run", "timeout", "stdbuf"),
        *("uv", "uvx", "python", "python3", "conda"),
    }
)

# Settings of the whole file: what is said about each that means something there. "": nothing to say.
_GLOBAL = {
    "apiKeys": "its keys weren't taken over: list them as auth.allowed_keys in secrets.yaml, and set "
    "auth.enabled",
    "startPort": "llamesh has the system pick ports; llama_cpp_ports in config.yaml names some",
    "peers": "other servers can't be peers: only nodes of llamesh join a mesh (llamesh invite, llamesh join)",
    "logLevel": "",
    "logTimeFormat": "",
    "logToStdout": "",
    "logRequests": "",
    "metricsMaxInMemory": "",
    "captureBuffer": "",
    "sendLoadingState": "a stream that waits gets SSE comments that say what for, see "
    "http.stream_keepalive_seconds",
    "includeAliasesInList": "",
    "performance": "",
    "store": "",
    "upstream": "",
    "ui": "",
}

# Settings of a model that nothing here corresponds to.
_WITHOUT = {
    "cmdStop": "llamesh ends instances itself (SIGTERM, then SIGKILL)",
    "useModelName": "llama-server answers to every name",
    "filters": "requests pass unchanged: set sampling defaults by flags (--temp, --top-p, ...)",
    "unlisted": "every enabled model is listed",
    "metadata": "there is no place for it",
    "timeouts": "see upstream_read_timeout_ms in config.yaml",
    "sendLoadingState": "see http.stream_keepalive_seconds in config.yaml",
    "rpcHealthCheck": "there is no such check",
    "capabilities": "a profile's kind follows from its flags",
}
_KNOWN = {
    *("cmd", "name", "description", "env", "proxy", "checkEndpoint", "ttl", "aliases", "macros"),
    *("concurrencyLimit", *_WITHOUT),
}


class CannotExpand(ValueError):
    """A command whose macros can't be replaced; the message says why."""


def looks_like_llama_swap(data: Any) -> bool:
    """Whether a YAML document is llama-swap's."""
    return isinstance(data, dict) and isinstance(data.get("models"), dict)


def convert(data: Mapping[str, Any], environ: Mapping[str, str]) -> Converted:
    """Every model that can be taken over. `environ` is what `${env.NAME}` names."""
    made = Converted()
    macros = _mapping(data.get("macros"))
    binaries: dict[str, list[str]] = {}
    for id_, model in data["models"].items():
        name = str(id_)
        if not isinstance(model, dict):
            made.leave_out(name, "it is no mapping of keys")
            continue
        _convert_model(made, name, model, data, macros, environ, binaries)
    _note_globals(made, data)
    _note_together(made, data)
    _choose_binary(made, binaries)
    return made


def _convert_model(
    made: Converted,
    name: str,
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    macros: Mapping[str, Any],
    environ: Mapping[str, str],
    binaries: dict[str, list[str]],
) -> None:
    known = {**macros, **_mapping(model.get("macros")), "MODEL_ID": name}
    try:
        words = split_command(expand(str(model.get("cmd") or ""), known, environ))
        program, words, variables = _program(words)
    except (CannotExpand, ValueError) as error:
        made.leave_out(name, str(error) if isinstance(error, CannotExpand) else "a quote in cmd isn't closed")
        return
    title, profile, note = split_name(name)
    recipe = Recipe(title, profile)
    recipe.notes += [note] if note else []
    take_arguments(recipe, words)
    settle_sources(recipe)
    if any(_PORT_MARK in word for word in [*recipe.words, *map(str, recipe.keys.values())]):
        made.leave_out(name, "its command uses ${PORT} elsewhere than after --port")
        return
    _take_settings(recipe, model, data, [*variables, *_names_of(model.get("env"))])
    binaries.setdefault(program, []).append(recipe.name)
    made.take(recipe)


# What ${PORT} becomes until it has been thrown away with its flag.
_PORT_MARK = "\N{NULL}PORT"


def expand(text: str, macros: Mapping[str, Any], environ: Mapping[str, str]) -> str:
    """The command with its macros replaced; macros may hold macros. Raises CannotExpand."""

    def value(found: re.Match[str]) -> str:
        name = found[1]
        if name == _PORT:
            return _PORT_MARK
        if name.startswith("env."):
            if (given := environ.get(name[4:])) is None:
                raise CannotExpand(f"the environment variable {name[4:]} isn't set here")
            return given
        if name not in macros or isinstance(macros[name], (dict, list)):
            raise CannotExpand(f"there is no macro ${{{name}}}")
        word = macros[name]
        return str(word).lower() if isinstance(word, bool) else str(word)

    for _ in range(_MOST_ROUNDS):
        if not _MACRO.search(text):
            return text
        text = _MACRO.sub(value, text)
        if len(text) > _LONGEST:
            break
    raise CannotExpand("its macros expand without end")


def split_command(text: str) -> list[str]:
    """The words of a command over several lines, without its comments. Raises ValueError."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    return shlex.split("\n".join(lines).replace("\\\n", " "))


def _program(words: list[str]) -> tuple[str, list[str], list[str]]:
    """The program, its arguments, and the variables that `env` sets before it. Raises CannotExpand."""
    variables: list[str] = []
    if words and _base(words[0]) == "env":
        words = words[1:]
        while words and re.match(r"[A-Za-z_]\w*=", words[0]):
            variables.append(words.pop(0).partition("=")[0])
    if not words:
        raise CannotExpand("it has no cmd")
    base = _base(words[0])
    if base.startswith("llama-server"):
        return words[0], words[1:], variables
    if base in _WRAPPERS:
        raise CannotExpand(
            f"it is started through {base}: llamesh starts llama-server itself; a script that does the same "
            "can be llama_cpp.binary_path"
        )
    raise CannotExpand(f"{words[0][:80]!r} isn't llama-server")


def _base(word: str) -> str:
    return re.split(r"[/\\]", word)[-1].lower().removesuffix(".exe")


def _take_settings(
    recipe: Recipe, model: Mapping[str, Any], data: Mapping[str, Any], variables: list[str]
) -> None:
    title, text = model.get("name"), model.get("description")
    words = " ".join(" ".join(str(part).split()) for part in (title, text) if part)
    recipe.description = "".join(letter for letter in words if letter.isprintable())
    idle = _number(model.get("ttl"))
    if idle is None or idle < 0:
        idle = _number(data.get("globalTTL"))  # -1 means so
    recipe.keys.setdefault("idle_timeout_seconds", max(0, idle or 0))
    wait = _number(data.get("healthCheckTimeout"))
    recipe.keys["startup_timeout_seconds"] = _USUAL_START if wait is None else max(_LEAST_START, wait)
    limit = _number(model.get("concurrencyLimit"))
    if limit is not None and limit >= 1:
        recipe.keys["max_queue_size"] = int(limit)
        recipe.notes.append(
            f"concurrencyLimit {int(limit)}: requests beyond the slots (--parallel) wait here, so many of "
            "them at most, and more are refused with 503"
        )
    aliases = model.get("aliases")
    for alias in aliases if isinstance(aliases, list) else ():
        word = alias.get("id") if isinstance(alias, dict) else alias
        if word is not None:
            recipe.aliases.append(str(word))
    if variables:
        recipe.notes.append(
            f"environment variables were left out: {', '.join(variables)}; the node's own environment is "
            "passed on, and --device chooses GPUs"
        )
    check = model.get("checkEndpoint")
    if check not in (None, "/health"):
        recipe.notes.append("checkEndpoint was left out: /health is what is asked")
    proxy = model.get("proxy")
    if proxy is not None and "${PORT}" not in str(proxy):
        recipe.notes.append("proxy was left out: instances listen on ports that llamesh picks")
    for key, why in _WITHOUT.items():
        if model.get(key):
            recipe.notes.append(f"{key} was left out: {why}")
    unknown = [str(key) for key in model if key not in _KNOWN]
    if unknown:
        recipe.notes.append(f"unknown keys were left out: {', '.join(unknown)}")


def _names_of(entries: Any) -> list[str]:
    """Only the names: the values may be secrets."""
    return [str(entry).partition("=")[0] for entry in entries] if isinstance(entries, list) else []


def _number(value: Any) -> float | None:
    """A number that can be meant, None for anything else."""
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e12
    return value if usable else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _note_globals(made: Converted, data: Mapping[str, Any]) -> None:
    for key in data:
        if key in ("models", "macros", "healthCheckTimeout", "globalTTL", "groups", "matrix", "hooks"):
            continue
        if key in _GLOBAL:
            if _GLOBAL[key] and data[key]:
                made.notes.append(f"{key}: {_GLOBAL[key]}")
        else:
            made.notes.append(f"{key} was left out: it isn't known")


def _note_together(made: Converted, data: Mapping[str, Any]) -> None:
    """Which models may run beside which: there, people say it; here it follows from memory."""
    groups = _mapping(data.get("groups"))
    by_name = {recipe.name: recipe for recipe in made.recipes}
    for title, group in groups.items():
        group = _mapping(group)
        members = [str(member) for member in group.get("members") or () if member is not None]
        traits = [key for key in ("swap", "exclusive", "persistent") if group.get(key) is not None]
        said = ", ".join(f"{key}: {str(group[key]).lower()}" for key in traits) or "no settings"
        for member in members:
            if (recipe := by_name.get(member)) is None:
                continue
            recipe.notes.append(f"group {title} ({said}): memory decides here who runs beside whom")
            if group.get("persistent"):
                recipe.notes.append("`min_instances: 1` keeps it loaded")
    if data.get("matrix"):
        made.notes.append("matrix was left out: memory decides here which models run beside each other")
    if not groups and not data.get("matrix"):
        made.notes.append(
            "llama-swap runs one model at a time; llamesh as many as fit, or max_instances_per_node in "
            "config.yaml"
        )
        made.config_notes.append(
            "max_instances_per_node: 1 would run one model at a time, as llama-swap does"
        )
    startup = _mapping(_mapping(data.get("hooks")).get("on_startup"))
    preload = startup.get("preload")
    for name in preload if isinstance(preload, list) else ():
        if (recipe := by_name.get(str(name))) is not None:
            recipe.notes.append(
                f"it was loaded at the start: `min_instances: 1` keeps it loaded, `llamesh prewarm "
                f"{recipe.name}` loads it once"
            )


def _choose_binary(made: Converted, binaries: Mapping[str, list[str]]) -> None:
    paths = {program: names for program, names in binaries.items() if "/" in program}
    if not paths:
        return
    usual = max(paths, key=lambda program: len(paths[program]))
    made.config["llama_cpp"] = {"binary_path": usual}
    for program, names in paths.items():
        if program != usual:
            made.notes.append(f"all models run with one llama-server here; {', '.join(names)} had {program}")
