"""`llamesh add`: one more model, and everything else as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamesh.commands.add import add, add_to
from llamesh.commands.shared.failed import Failed
from llamesh.commands.shared.named import Wishes, read_model
from llamesh.config.cookbook import HubFile, ModelPath, UrlFile, load_cookbook

HEAD = "# My models.\n"
TAIL = "# The end.\n"
INDENTED = """\
  - name: a
    profiles:
      - id: default
        model_path: /m  # here
"""
FLUSH = """\
- name: a
  profiles:
  - {id: default, model_path: /m}
"""
FOLDED = """\
    - name: a
      profiles:
        - id: default
          llama_server_args: >-
            -m x
            -c 5
"""


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        HEAD,
        HEAD + "models:\n",
        HEAD + "models: []\n",
        HEAD + "models: [ ]  # none yet\n" + TAIL,
        HEAD + "models: null\n",
        HEAD + "models:  # mine\n  # about a\n" + INDENTED + TAIL,
        HEAD + "models:\n" + FLUSH + "- name: b\n  profiles: [{id: x, model_path: /m}]",
        "models:\n\n" + FOLDED,
        '"models":\n' + FLUSH,
    ],
)  # fmt: skip
def test_comments_and_order_stay(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "cookbook.yaml"
    if text is not None:
        path.write_text(text)
    before = load_cookbook(path).profiles if text else ()
    if text is not None and text.startswith('"models"'):
        with pytest.raises(Failed, match=r"by hand"):
            add_to(path, "new", read_model("o/n:Q8_0"), "")
        assert path.read_text() == text
        return
    for count, name in enumerate(("new", "newer"), 1):
        add_to(path, name, read_model("o/n:Q8_0"), "-c 8192")
        after = load_cookbook(path).profiles
        assert after[: len(before)] == before
        assert len(after) == len(before) + count
        assert (after[-1].model, after[-1].source) == (name, HubFile("o/n:Q8_0", None))
        assert after[-1].arguments == ("-c", "8192")
    for line in (text or "").splitlines():
        if "#" in line:
            assert line[line.index("#") :] in path.read_text()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("models: [{name: a, profiles: [{id: default, model_path: /m}]}]\n", "by hand"),
        ("models:\n- name: new\n  profiles: [{id: default, model_path: /m}]\n", "has a model new already"),
    ],
)
def test_what_cant_be_appended_to_stays_as_it_is(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "cookbook.yaml"
    path.write_text(text)
    with pytest.raises(Failed, match=complaint):
        add_to(path, "new", read_model("o/n"), "")
    assert path.read_text() == text


def test_a_broken_cookbook_is_told_with_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cookbook.yaml"
    path.write_text("models:\n- nome: a\n")
    assert add("o/n", path, Wishes(check=False)) == 1
    assert f"{path}:2: models[0].nome: unknown key" in capsys.readouterr().err


def test_rights_and_a_symlink_stay(tmp_path: Path) -> None:
    real, path = tmp_path / "real.yaml", tmp_path / "cookbook.yaml"
    real.write_text("models: []\n")
    real.chmod(0o600)
    path.symlink_to(real)
    add_to(path, "new", read_model("o/n"), "")
    assert path.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir() if "yaml" not in entry.suffix] == []


def test_what_a_model_is(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = read_model("Owner/Qwen3-8B-GGUF:Q4_K_M")
    assert (named.source, named.name) == (HubFile("Owner/Qwen3-8B-GGUF:Q4_K_M", None), "qwen3-8b")
    assert read_model("o/n", file="sub/f.gguf").source == HubFile("o/n", "sub/f.gguf")
    url = "https://x.example/My%20Model.gguf"
    assert read_model(url, sha256="AB" * 32).source == UrlFile(url, "ab" * 32)
    assert read_model(url, sha256="ab" * 32).name == "my-model"
    path = tmp_path / "Tiny.gguf"
    path.write_bytes(tiny_model.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert read_model("./Tiny.gguf").source == read_model(str(path)).source == ModelPath(str(path))
    assert read_model("Tiny.gguf").name == "tiny"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("nothing", "not a repository"),
        ("../x", "there is no file"),
        ("a/../b", "not a repository"),
        ("none.gguf", "there is no file"),
        ("https://x.example/m.gguf", "needs --sha256"),
        ("http://x.example/m.gguf", "needs --sha256"),
        ("--upload-pack", "not a repository"),
    ],
)
def test_what_isnt_a_model(text: str, complaint: str) -> None:
    with pytest.raises(Failed, match=complaint):
        read_model(text)


def test_files_that_arent_a_model(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"no model")
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(b"GGUF")
    with pytest.raises(Failed, match="isn't a GGUF file"):
        read_model(str(tmp_path / "m.gguf"))
    with pytest.raises(Failed, match=r"name m-00001-of-00002\.gguf"):
        read_model(str(tmp_path / "m-00002-of-00002.gguf"))


def test_arguments_and_names_that_need_quotes(tmp_path: Path) -> None:
    path = tmp_path / "cookbook.yaml"
    for name, arguments in (("yes", "-c 1 --x '{\"a\": 1}'"), ("1.5", "# no comment"), ('q"uote', "")):
        add_to(path, name, read_model("o/n:1"), arguments)
        last = load_cookbook(path).profiles[-1]
        assert last.model == name
        assert last.source == HubFile("o/n:1", None)
    with pytest.raises(Failed, match="--args: a quote isn't closed"):
        add_to(path, "x", read_model("o/n"), "-c '")
