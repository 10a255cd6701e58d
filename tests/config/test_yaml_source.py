"""YAML from strangers: every bad file is one ConfigError with its line, never anything else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llamesh.config.problems import ConfigError, Problem
from llamesh.config.yaml_source import MAX_BYTES, MAX_NODES, parse_yaml, read_yaml


def complaint(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "f.yaml")
    return str(caught.value)


def test_reads_plain_data_with_the_place_of_every_key() -> None:
    document = parse_yaml("a: 1\nb:\n  - x\n  - c: true\n    d: 2.5\n\ne:\n", "f.yaml")
    assert document.data == {"a": 1, "b": ["x", {"c": True, "d": 2.5}], "e": None}
    lines = {path: place.line for path, place in document.places.items()}
    assert lines == {
        ("a",): 1,
        ("b",): 2,
        ("b", 0): 3,
        ("b", 1): 4,
        ("b", 1, "c"): 4,
        ("b", 1, "d"): 5,
        ("e",): 7,
    }
    assert {place.file for place in document.places.values()} == {"f.yaml"}


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("", None),
        ("# nothing but this\n", None),
        ("---\n", None),
        ("\ufeffa: 1", {"a": 1}),
        ("a: '1'", {"a": "1"}),
        ("a: !!str 1", {"a": "1"}),
        ("a: ! 1", {"a": "1"}),
        ("a: yes", {"a": "yes"}),
        ("a: 2024-01-31", {"a": "2024-01-31"}),
        ("a: 0x10", {"a": 16}),
        ("a: .inf", {"a": float("inf")}),
        ("1: a\nnull: b\ntrue: c", {"1": "a", "null": "b", "true": "c"}),
        ("a: |\n  x\n  y\n", {"a": "x\ny\n"}),
        ('{"a": "\\ud83d\\ude00"}', {"a": "😀"}),
        ("a: &x {b: 1}\nc: *x", {"a": {"b": 1}, "c": {"b": 1}}),
        ("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}", {"a": {"b": 1, "c": 2}, "d": {"c": 3, "b": 1}}),
        ("a: &x {b: 1}\nc: &y {b: 2}\nd: {<<: [*x, *y]}", {"a": {"b": 1}, "c": {"b": 2}, "d": {"b": 1}}),
        ("'<<': 1", {"<<": 1}),
    ],
)
def test_means_what_yaml_says(text: str, data: Any) -> None:
    assert parse_yaml(text.removeprefix("\ufeff"), "f.yaml").data == data


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: [1", "f.yaml:2: not valid YAML"),
        ("a: 1\n\tb: 1", "f.yaml:2: not valid YAML"),
        ("a: b: c", "f.yaml:1: not valid YAML: mapping values are not allowed here"),
        ("a: 'x\nb: 1\n", "f.yaml:3: not valid YAML"),
        ("a: *x", "f.yaml:1: alias *x has no anchor"),
        ("a: &x [*x]", "f.yaml:1: alias *x holds itself"),
        ("a: 1\nb: !!python/object:os.system {}", "f.yaml:2: a YAML tag that isn't known"),
        ("a: !!binary aGk=", "f.yaml:1: a YAML tag that isn't known"),
        ("a: !!set {}", "f.yaml:1: a YAML tag that isn't known"),
        ("a: !!int x", "f.yaml:1: not a valid int"),
        ("a: !!bool x", "f.yaml:1: not a valid bool"),
        ("a: !!int ''", "f.yaml:1: not a valid int"),
        ("%YAML 1.1\n---\na: 1" + ":1" * 50_000, "f.yaml:3: not a valid int"),
        ("a: " + "9" * 5000, "f.yaml:1: not a valid int"),
        ("[a]: 1", "f.yaml:1: a list or a mapping can't be a key"),
        ("a: 1\n<<: 3", "f.yaml:2: << merges mappings only"),
        ("a: 1\n---\nb: 1", "f.yaml:2: holds more than one document"),
        ("a: \x01", "f.yaml:1: holds a character that YAML forbids"),
        ('a: 1\nb: "\\ud800"', "f.yaml:2: an escape that isn't a character"),
        ("a: 1\nb: \x00", "f.yaml:2: holds a character that YAML forbids"),
        ("a: " + "[" * 5000, "f.yaml:1: nested deeper than 32 levels"),
        ("- " * 5000, "f.yaml:1: nested deeper than 32 levels"),
        ("- 1\n" * (MAX_NODES + 1), f"f.yaml:{MAX_NODES}: holds more than {MAX_NODES} values"),
    ],
)
def test_refuses(text: str, said: str) -> None:
    assert said in complaint(text)


def test_a_syntax_error_never_quotes_the_line() -> None:
    assert "hunter2" not in complaint("auth:\n  allowed_keys: ['hunter2\n")


def test_aliases_can_not_multiply() -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 12)
    )
    assert f"holds more than {MAX_NODES} values" in complaint(bomb)


def test_merges_can_not_multiply() -> None:
    bomb = "a0: &a0 {k: 1}\n" + "".join(
        f"a{level}: &a{level} {{<<: [{', '.join([f'*a{level - 1}'] * 9)}]}}\n" for level in range(1, 12)
    )
    assert f"holds more than {MAX_NODES} values" in complaint(bomb)


def test_a_key_that_is_there_twice_is_told_and_the_first_one_counts() -> None:
    document = parse_yaml("a: 1\nb:\n  c: 1\n  c: 2\na: 3\n", "f.yaml")
    assert document.data == {"a": 1, "b": {"c": 1}}
    assert sorted(str(problem) for problem in document.problems) == [
        "f.yaml:4: b.c: the key is there twice (remove one; the first is on line 3)",
        "f.yaml:5: a: the key is there twice (remove one; the first is on line 1)",
    ]


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    return str(caught.value)


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    assert refusal(path) == f"{path}: doesn't exist (check the path)"
    assert refusal(tmp_path) == f"{tmp_path}: is a directory (name the YAML file in it)"
    assert "can't be read" in refusal(tmp_path / "f.yaml\0")
    assert "can't be read: " in refusal(tmp_path / ("x" * 5000))
    path.write_bytes(b"a: 1\nb: \xff\xfe\n")
    assert refusal(path) == f"{path}:2: isn't UTF-8 text (save it as UTF-8)"
    path.write_bytes(b"#" * (MAX_BYTES + 1))
    assert refusal(path) == f"{path}: is larger than 512 KiB (is it the right file?)"
    path.write_bytes(b"a: 1\n" + b"#" * (11 * 1024 * 1024))
    assert "is larger than" in refusal(path)


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert refusal(pipe) == f"{pipe}: isn't a regular file (name a YAML file)"


def test_a_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f.yaml"
    path.write_text("a: 1")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # root may read everything, so chmod proves nothing
    assert refusal(path) == f"{path}: can't be read (allow this user to read it)"


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    assert read_yaml(path).data == {"a": 1, "b": 2}


@given(
    st.one_of(
        st.text(max_size=60),
        st.text(alphabet="ab:-?[]{}&*!|>'\"%@`#,~<= \n\t0.", max_size=60),
    )
)
@example("%YAML 1.1\n---\na: 0o9")
@example("%YAML 9.9\n---\na: 1")
@example("%TAG ! tag:x\n---\n!a b")
@example("a: |9\n x")
@example('"\\x"')
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_document_or_a_config_error(text: str) -> None:
    problems: tuple[Problem, ...] = ()
    try:
        document = parse_yaml(text, "f.yaml")
    except ConfigError as error:
        problems = error.problems
    else:
        assert all(place.line for place in document.places.values())
    assert all(problem.hint for problem in problems)
