"""What the documents have people type and set is there: commands, options, links, keys, metrics, paths."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from llamesh.cli import COMMANDS, command_line
from llamesh.config.cookbook import load_cookbook
from llamesh.config.json_schema import json_schema
from llamesh.config.settings import load_settings

CHECKOUT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path.relative_to(CHECKOUT).as_posix()
    for pattern in ("*.md", "docs/*.md", "benchmarks/*.md", "deploy/**/*.md")
    for path in CHECKOUT.glob(pattern)
)

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} (.+)$", re.M)
_FOLDERS = ("benchmarks", "deploy", "docs", "llamesh", "scripts", "tests")
# Written by what the document tells people to run.
_MADE = ("benchmarks/results/",)
# A word in capitals stands for something of the reader's.
_STANDS_FOR = re.compile(r"[A-Z_]{2,}")

every_document = pytest.mark.parametrize("name", DOCUMENTS)


def text_of(name: str) -> str:
    return (CHECKOUT / name).read_text(encoding="utf-8")


def prose_of(name: str) -> str:
    """Without what is between fences."""
    return _FENCE.sub("", text_of(name))


def anchors(name: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in _HEADING.findall(prose_of(name)):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        again = 0
        while (slug if not again else f"{slug}-{again}") in found:
            again += 1
        found.add(slug if not again else f"{slug}-{again}")
    return found


@every_document
def test_links_lead_somewhere(name: str) -> None:
    broken = []
    for target in _LINK.findall(_SPAN.sub("", prose_of(name))):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (CHECKOUT / name).parent / path if path else CHECKOUT / name
        found = there.exists()
        if anchor and found:
            found = anchor in anchors(there.resolve().relative_to(CHECKOUT).as_posix())
        if not found:
            broken.append(target)
    assert broken == []


def invocations(name: str) -> Iterator[list[str]]:
    """What follows `llamesh` wherever a document shows it as something to type."""
    lines = [line for _, block in _FENCE.findall(text_of(name)) for line in block.splitlines()]
    for typed in [*lines, *_SPAN.findall(prose_of(name))]:
        for part in re.split(r"\|\|?|&&|;|\$\(|`", typed):
            lexer = shlex.shlex(part, posix=True, punctuation_chars=False)
            lexer.whitespace_split = True
            lexer.commenters = "#"
            try:
                words = list(lexer)
            except ValueError:  # an apostrophe in an output, or half of something quoted
                continue
            words = words[1:] if words[:1] == ["$"] else words
            if words[:1] == ["sudo"]:
                at = [i for i, word in enumerate(words) if word == "llamesh" and words[i - 1] != "-u"]
                words = words[at[0] :] if at else []
            if words[:1] == ["llamesh"] and not (words[1:] and re.match(r"\d|=|:", words[1])):
                yield words[1:]


def options_of(command: click.Command) -> set[str]:
    found = {one for parameter in command.params for one in (*parameter.opts, *parameter.secondary_opts)}
    return {one for one in found if one.startswith("-")} | {"--help"}


def load(name: str) -> click.Command:
    module, _, member = COMMANDS[name].partition(":")
    found = getattr(import_module(module), member)
    assert isinstance(found, click.Command)
    return found


def wrong_with(words: list[str]) -> str:
    """What the program wouldn't understand of a command line, or ""."""
    known, command = options_of(command_line(lambda *given: 0)), ""
    for word in (one.strip("[]") for one in words):
        option = word.split("=")[0].rstrip(",)")
        if word == "--":
            break
        if re.match(r"--?[a-z]", option):
            if option not in known:
                return f"{command or 'llamesh'} has no {option}"
        elif not command and not re.search(r"[/.]", word) and not _STANDS_FOR.fullmatch(word):
            for one in word.split("|"):
                if one not in COMMANDS:
                    return f"there is no command {one}"
            command, known = word, options_of(load(word)) | known
    return ""


@every_document
def test_commands_and_their_options_are_there(name: str) -> None:
    complaints = [(shlex.join(words), wrong_with(words)) for words in invocations(name)]
    assert [one for one in complaints if one[1]] == []


def test_wrong_commands_are_noticed() -> None:
    assert wrong_with(["stauts"]) == "there is no command stauts"
    assert wrong_with(["status", "--wach"]) == "status has no --wach"
    assert wrong_with(["--cookbok", "x.yaml"]) == "llamesh has no --cookbok"
    assert sum(1 for name in DOCUMENTS for _ in invocations(name)) > 80


def test_the_manual_names_options_that_are_there() -> None:
    """Options that stand alone in docs/commands.md are those of the command whose heading is above them."""
    wrong = []
    parts = re.split(r"^### (\S+)$", prose_of("docs/commands.md"), flags=re.M)[1:]
    for command, part in zip(parts[::2], parts[1::2], strict=True):
        known = options_of(load(command))
        spans = _SPAN.findall(part.partition("\n## ")[0])
        found = [re.match(r"--?[a-z][\w-]*", span) for span in spans]
        wrong += [(command, one[0]) for one in found if one and one[0] not in known]
    assert wrong == []


def keys_of(schema: dict[str, Any], above: str = "") -> Iterator[str]:
    for key, inner in schema.get("properties", {}).items():
        yield above + key
        yield from keys_of(inner, f"{above}{key}.")


@every_document
def test_settings_are_there(name: str) -> None:
    keys = set(keys_of(json_schema("config")))
    sections = {key.split(".")[0] for key in keys if "." in key}
    named = [span for span in _SPAN.findall(prose_of(name)) if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", span)]
    assert [span for span in named if span.split(".")[0] in sections and span not in keys] == []


def is_yaml_of(block: str, top: set[str]) -> bool:
    try:
        document = yaml.safe_load(block)
    except yaml.YAMLError:
        return False
    return isinstance(document, dict) and bool(document) and set(document) <= top


@every_document
def test_files_that_are_shown_are_accepted(name: str, tmp_path: Path) -> None:
    sections = {key for key in keys_of(json_schema("config")) if "." not in key}
    nowhere = tmp_path / "secrets.yaml"
    # An example's certificate is the reader's.
    certificate = {"LLAMESH_SERVER_TLS__ENABLED": "false"}
    for number, (_, block) in enumerate(_FENCE.findall(text_of(name))):
        path = tmp_path / f"{number}.yaml"
        block = "models:\n" + block if block.startswith("  - name:") else block
        path.write_text(block)
        if is_yaml_of(block, {"models"}):
            assert load_cookbook(path).profiles
        elif is_yaml_of(block, sections):
            load_settings(path, nowhere, certificate, required=True, secrets_required=False)


@every_document
def test_metrics_are_there(name: str) -> None:
    known = set(re.findall(r"^\| `(llamesh_\w+)`", text_of("docs/metrics.md"), re.M))
    known |= {f"{one}_{part}" for one in known for part in ("bucket", "sum", "count")}
    assert known
    assert set(re.findall(r"\bllamesh_[a-z_]+\b", text_of(name))) - known == set()


@every_document
def test_paths_are_there(name: str) -> None:
    typed = " ".join(block for _, block in _FENCE.findall(text_of(name)))
    spans = " ".join(_SPAN.findall(prose_of(name)))
    named = re.findall(rf"(?<![\w/.~-])((?:{'|'.join(_FOLDERS)})/[\w./-]+)", f"{typed} {spans}")
    missing = [one for one in named if one not in _MADE and not (CHECKOUT / one.rstrip(".")).exists()]
    assert [one for one in missing if not _STANDS_FOR.search(one)] == []
