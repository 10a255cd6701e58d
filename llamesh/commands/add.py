"""`llamesh add MODEL`: one more model in the cookbook, everything that stands there as it was."""

from __future__ import annotations

import json
import os
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import click

from llamesh.commands.shared import exit_codes
from llamesh.commands.shared.failed import Failed
from llamesh.commands.shared.named import MODEL_WORDS, Named, Wishes, read_model, wishes_options
from llamesh.commands.shared.options import Files, files_options
from llamesh.commands.shared.options import command as make
from llamesh.commands.shared.saying import fail, out
from llamesh.config.arguments import read_arguments
from llamesh.config.cookbook import Cookbook, HubFile, ModelPath, UrlFile, parse_cookbook
from llamesh.config.model_names import split_repo
from llamesh.config.problems import ConfigError
from llamesh.config.yaml_source import read_yaml
from llamesh.core.model_files import NoSuchModel, choose
from llamesh.local.weights import WeightsError, find_cache
from llamesh.local.weights.errors import Unreachable
from llamesh.local.weights.hub import list_repo
from llamesh.local.weights.progress import in_words

# A list in a flow (`models: [...]`) holds nothing that could be kept apart from it; only an empty one is met.
_EMPTY_LIST = re.compile(r"^models:[ \t]*(\[[ \t]*\]|null|~)?[ \t]*(#[^\n]*)?$", re.MULTILINE)
_ITEM_FOLLOWS = re.compile(r"[ \t]*\n(?:[ \t]*(?:#[^\n]*)?\n)*[ \t]*-")
_PLAIN = re.compile(r"[A-Za-z_][\w./+@-]*(:[\w.-]+)?")
_NOT_TEXT = frozenset({"true", "false", "null", "yes", "no", "on", "off", "y", "n"})


@make(
    ("llamesh add ggml-org/gemma-3-1b-it-GGUF:Q4_K_M", "from the hub, fetched when it is first asked for"),
    ("llamesh add ~/models/qwen3.gguf --name qwen3 --args='-c 16384'", "a file"),
    epilog=f"MODEL is {MODEL_WORDS}.",
)
@click.argument("model", metavar="MODEL")
@wishes_options
@files_options(cookbook=True)
def command(model: str, wishes: Wishes, files: Files) -> int:
    """Add MODEL to the cookbook; what stands there stays as it is."""
    return add(model, files.cookbook, wishes)


def add(model: str, path: Path, wishes: Wishes) -> int:
    """Do it to the cookbook at `path`; the exit code."""
    try:
        named = read_model(model, file=wishes.file, sha256=wishes.sha256)
        name = wishes.name or named.name
        words = _check(named) if wishes.check else ""
        add_to(path, name, named, wishes.args)
    except (Failed, ConfigError, WeightsError) as error:
        return fail(error)
    out(f"{name} is in {path}{words}")
    return exit_codes.OK


def add_to(path: Path, name: str, named: Named, arguments: str) -> None:
    """Append the model to the cookbook at `path`, which is made when it isn't there.

    Raises Failed, ConfigError.
    """
    if complaints := read_arguments(arguments).complaints:
        raise Failed(f"--args: {complaints[0].message}: {complaints[0].hint}")
    target = path.resolve()  # a symlink stays one
    text = target.read_text(encoding="utf-8") if target.exists() else ""
    before = _parse(text, target)
    if before.find(name) is not None:
        raise Failed(f"{path} has a model {name} already: give another name with --name")
    changed = _with_entry(text, _entry(name, named, arguments, target.parent))
    try:
        after = _parse(changed, target)
    except ConfigError:
        after = Cookbook()
    if not after.profiles or after.profiles[:-1] != before.profiles or after.find(name) != after.profiles[-1]:
        raise Failed(f"{path} isn't written in a way that a model can be appended to: add it by hand")
    _write(target, changed)


def _check(named: Named) -> str:
    """Ask the hub whether there is such a model; how large it is, in words. Raises Failed, WeightsError."""
    if not isinstance(named.source, HubFile) or find_cache(os.environ).offline:
        return ""
    repo, quant = split_repo(named.source.repo)
    try:
        files = choose(list_repo(repo).files, file=named.source.file, quant=quant).files
    except NoSuchModel as error:
        raise Failed(f"{repo}: {error}") from None
    except Unreachable as error:
        raise Failed(f"{error}. To add it all the same: `llamesh add --no-check`") from None
    size = in_words(sum(file.size for file in files))
    return f": {files[0].name}, {size}, fetched when it is first asked for (or now, with `llamesh pull`)"


def _entry(name: str, named: Named, arguments: str, folder: Path) -> list[str]:
    """The lines of a model, without the indentation of the list."""
    source, keys = named.source, dict[str, str]()
    if isinstance(source, HubFile):
        keys["hf_repo"] = source.repo
        if source.file is not None:
            keys["hf_file"] = source.file
    elif isinstance(source, UrlFile):
        keys = {"url": source.url, "sha256": source.sha256}
    elif isinstance(source, ModelPath):
        keys["model_path"] = source.path
    if arguments:
        keys["llama_server_args"] = arguments
    lines = [f"- name: {_scalar(name)}", "  profiles:", "    - id: default"]
    return lines + [f"      {key}: {_scalar(value)}" for key, value in keys.items()]


def _scalar(value: str) -> str:
    """As YAML; JSON's strings are YAML's."""
    plain = _PLAIN.fullmatch(value) and value.lower() not in _NOT_TEXT
    return value if plain else json.dumps(value, ensure_ascii=False)


def _with_entry(text: str, entry: list[str]) -> str:
    """The text with the entry at the end of its list of models, which is all that a cookbook holds."""
    found = _EMPTY_LIST.search(text)
    if found and not _ITEM_FOLLOWS.match(text[found.end() :]):
        comment = f"  {found[2]}" if found[2] else ""
        lines = "\n".join(f"  {line}" for line in entry)
        rest = text[found.end() :].strip("\n")
        return f"{text[: found.start()]}models:{comment}\n{lines}\n" + (f"{rest}\n" if rest else "")
    if not re.search(r"^models:", text, re.MULTILINE):
        head = f"{text.rstrip()}\n\n" if text.strip() else ""
        return f"{head}models:\n" + "".join(f"  {line}\n" for line in entry)
    dash = re.search(r"^models:[^\n]*\n(?:[ \t]*(?:#[^\n]*)?\n)*([ ]*)- ", text, re.MULTILINE)
    if dash is None:
        raise Failed("the cookbook's list of models isn't written one below the other: add the model by hand")
    indent = dash[1]
    return f"{text.rstrip()}\n\n" + "".join(f"{indent}{line}\n" for line in entry)


def _parse(text: str, target: Path) -> Cookbook:
    """What a cookbook with this text at `target` holds. Raises ConfigError."""
    if not text.strip():
        return Cookbook()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, target.name)
        copy.write_text(text, encoding="utf-8")
        try:
            return parse_cookbook(read_yaml(copy), target.parent)
        except ConfigError as error:
            raise ConfigError(replace(p, file=str(target)) for p in error.problems) from None


def _write(target: Path, text: str) -> None:
    """All or nothing, with the rights that the file has."""
    try:
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o644
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        temporary.chmod(mode)
        os.replace(temporary, target)
    except OSError as error:
        raise Failed(f"{target} can't be written: {error.strerror}") from None


EMPTY_COOKBOOK = """\
# The models of this node. `llamesh add OWNER/NAME:QUANTISATION` (or a path) appends one;
# cookbook.example.yaml lists every key. A node that runs takes changes in within a second.

models: []
"""


def write_new(path: Path, text: str) -> None:
    """Write a file that mustn't be there yet. Raises Failed."""
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise Failed(f"{path} is there already; it stays as it is") from None
    except OSError as error:
        raise Failed(f"{path} can't be written: {error.strerror}") from None
