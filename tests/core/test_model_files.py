"""Which files of a repository are meant."""

from __future__ import annotations

import pytest

from llamesh.core.model_files import (
    NoSuchModel,
    RemoteFile,
    choose,
    is_projector,
    later_part,
    part_names,
    quant_of,
    quants,
)


def repository(*names: str) -> list[RemoteFile]:
    return [RemoteFile(name, 100, sha256=f"{number:064x}") for number, name in enumerate(names)]


USUAL = repository(
    "README.md",
    "Model-3B-Q8_0.gguf",
    "Model-3B-Q4_K_M.gguf",
    "Model-3B-Q4_K_S.gguf",
    "Model-3B-UD-Q4_K_XL.gguf",
    "Model-3B-IQ2_XXS.gguf",
    "mmproj-Model-3B-F16.gguf",
    "mmproj-Model-3B-F32.gguf",
    "imatrix.gguf",
)

LARGE = repository(
    *(f"Q4_K_M/Big-Q4_K_M-{number:05}-of-00003.gguf" for number in (3, 1, 2)),
    "Big-UD-Q2_K_XL.gguf",
    *(f"Q8_0/Big-Q8_0-{number:05}-of-00004.gguf" for number in (1, 2, 4)),
)


@pytest.mark.parametrize(
    ("quant", "name"),
    [
        (None, "Model-3B-Q4_K_M.gguf"),
        ("Q8_0", "Model-3B-Q8_0.gguf"),
        ("q4_k_s", "Model-3B-Q4_K_S.gguf"),
        ("UD-Q4_K_XL", "Model-3B-UD-Q4_K_XL.gguf"),
        ("Q4_K_XL", "Model-3B-UD-Q4_K_XL.gguf"),
        ("IQ2_XXS", "Model-3B-IQ2_XXS.gguf"),
    ],
)
def test_a_quantisation_is_the_end_of_the_name(quant: str | None, name: str) -> None:
    choice = choose(USUAL, quant=quant)
    assert [part.name for part in choice.parts] == [name]
    assert choice.projector is not None
    assert choice.projector.name == "mmproj-Model-3B-F16.gguf"
    assert choice.files == (*choice.parts, choice.projector)


def test_who_needs_no_projector_gets_none() -> None:
    assert choose(USUAL, projector=False).projector is None


def test_the_plain_quantisation_wins_over_a_variant() -> None:
    files = repository("a-UD-Q4_K_M.gguf", "a-much-longer-name-Q4_K_M.gguf")
    assert choose(files).parts[0].name == "a-much-longer-name-Q4_K_M.gguf"


def test_without_the_usual_ones_it_is_the_first() -> None:
    assert choose(repository("b.gguf", "a-F32.gguf", "mmproj-a.gguf")).parts[0].name == "a-F32.gguf"
    assert choose(repository("a-Q8_0.gguf", "a-BF16.gguf")).parts[0].name == "a-Q8_0.gguf"


def test_a_split_model_comes_in_order() -> None:
    names = [f"Q4_K_M/Big-Q4_K_M-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    assert [part.name for part in choose(LARGE).parts] == names
    assert [part.name for part in choose(LARGE, file=names[0]).parts] == names


def test_the_projector_of_its_own_folder_comes_first() -> None:
    files = repository("x/a-Q4_K_M.gguf", "x/mmproj-F32.gguf", "mmproj-F16.gguf", "b-Q8_0.gguf")
    inner, outer = choose(files).projector, choose(files, quant="Q8_0").projector
    assert inner is not None
    assert outer is not None
    assert (inner.name, outer.name) == ("x/mmproj-F32.gguf", "mmproj-F16.gguf")


@pytest.mark.parametrize(
    ("files", "file", "quant", "message"),
    [
        (USUAL, None, "Q3_K", "there is no Q3_K in it; it has Q8_0, Q4_K_M, Q4_K_S, UD-Q4_K_XL, IQ2_XXS"),
        (USUAL, "other.gguf", None, "there is no file other.gguf in it; it has Q8_0"),
        (LARGE, None, "Q8_0", "is one of 4 parts, and Q8_0/Big-Q8_0-00003-of-00004.gguf isn't in it"),
        (LARGE, "Q4_K_M/Big-Q4_K_M-00002-of-00003.gguf", None, "isn't the first part of its model"),
        (repository("model.safetensors"), None, None, "there is no GGUF model in it"),
        (repository("model.safetensors"), "x.gguf", None, "it holds no GGUF model"),
        ([], None, "Q4_0", "there is no GGUF model in it"),
    ],
)
def test_what_isnt_there_is_said(
    files: list[RemoteFile], file: str | None, quant: str | None, message: str
) -> None:
    with pytest.raises(NoSuchModel) as caught:
        choose(files, file=file, quant=quant)
    assert message in str(caught.value)


def test_many_quantisations_are_not_all_named() -> None:
    files = repository(*(f"m-Q{number}_0.gguf" for number in range(2, 40)))
    with pytest.raises(NoSuchModel, match=r"Q13_0, and 26 more$"):
        choose(files, quant="nope")


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("a/Model-Q4_K_M-00001-of-00002.gguf", "Q4_K_M"),
        ("Q5_K_S/weights.gguf", "Q5_K_S"),
        ("model.f16.gguf", "F16"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("model.gguf", ""),
    ],
)
def test_the_name_tells_the_quantisation(name: str, quant: str) -> None:
    assert quant_of(name) == quant


def test_names_of_parts() -> None:
    assert part_names("a-00001-of-00002.gguf") == ("a-00001-of-00002.gguf", "a-00002-of-00002.gguf")
    assert part_names("a.gguf") == ("a.gguf",)
    assert later_part("a-00002-of-00002.gguf")
    assert not later_part("a-00001-of-00002.gguf")
    assert is_projector("x/mmproj-a.gguf")
    assert not is_projector("mmproj/a.gguf")
    assert quants(LARGE) == ["Q4_K_M", "UD-Q2_K_XL", "Q8_0"]
