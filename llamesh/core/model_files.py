"""Which files of a repository make up the model that somebody named.

A repository holds one model in several quantisations, a large one cut into parts
(`name-00001-of-00003.gguf`), and maybe a projector for images (`mmproj-...gguf`). The rules follow what
people and llama.cpp's `-hf` mean by `owner/name:Q4_K_M`: the quantisation is the end of the file's name
(or the folder it lies in), upper and lower case being the same; without one, Q4_K_M,
then Q8_0, then the first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})", re.DOTALL)
_QUANT = re.compile(
    r"(?:(?<=[-._/])|^)((?:UD-)?(?:I?Q\d+(?:_[A-Z0-9]+)*|TQ\d_\d|BF16|F16|F32|FP16|FP32|MXFP4(?:_[A-Z]+)*))$",
    re.IGNORECASE,
)
_USUAL = ("Q4_K_M", "Q8_0")
# The smaller projectors lose little, but these two are what everything can run.
_PROJECTORS = ("F16", "BF16", "Q8_0", "F32")
_NAMED_AT_MOST = 12


class NoSuchModel(ValueError):
    """The repository has no such file, or not all of it. The message names what there is."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository. `size` in bytes. `sha256` is of its content; a small file that the hub keeps
    in git has `git_sha1` instead, the hash of git's blob."""

    name: str
    size: int
    sha256: str | None = None
    git_sha1: str | None = None

    @property
    def digest(self) -> str:
        """What tells this content from any other; also its name in the hub's cache."""
        return self.sha256 or self.git_sha1 or ""


@dataclass(frozen=True, slots=True)
class Choice:
    """The parts of a model in order (mostly one), and its projector if it has one."""

    parts: tuple[RemoteFile, ...]
    projector: RemoteFile | None = None

    @property
    def files(self) -> tuple[RemoteFile, ...]:
        """All files, the first part first."""
        return self.parts if self.projector is None else (*self.parts, self.projector)


def choose(
    files: Iterable[RemoteFile], *, file: str | None = None, quant: str | None = None, projector: bool = True
) -> Choice:
    """The files of a model: of the one in `file`, else of the quantisation `quant`, else the usual one.

    `projector`: with that for images, where there is one. Raises NoSuchModel.
    """
    by_name = {one.name: one for one in files if one.name.lower().endswith(".gguf")}
    first = _of_quant(by_name, quant) if file is None else _named(by_name, file)
    parts = _parts(by_name, first)
    return Choice(parts, _projector(by_name, first) if projector else None)


def quants(files: Iterable[RemoteFile]) -> list[str]:
    """The quantisations that can be asked for, in the order of their files."""
    found = [quant_of(one.name) for one in files if _is_model(one.name)]
    return list(dict.fromkeys(quant for quant in found if quant))


def quant_of(name: str) -> str:
    """The quantisation that a file's name tells, "" for none: of `a/Model-Q4_K_M-00001-of-00002.gguf`,
    Q4_K_M.
    """
    stem = _stem(name)
    found = _QUANT.search(stem.rpartition("/")[2]) or _QUANT.search(stem.rpartition("/")[0])
    return found[1].upper() if found else ""


def is_projector(name: str) -> bool:
    """Whether a file of this name holds a projector rather than a model."""
    return "mmproj" in name.rpartition("/")[2].lower()


def later_part(name: str) -> bool:
    """Whether a file of this name is a part of a model, and not the first one."""
    found = _PART.fullmatch(name.removesuffix(".gguf"))
    return found is not None and int(found["number"]) != 1


def part_names(name: str) -> tuple[str, ...]:
    """The names of all parts of the model whose first part (or only file) is `name`."""
    found = _PART.fullmatch(name.removesuffix(".gguf"))
    if found is None:
        return (name,)
    count = int(found["count"])
    return tuple(f"{found['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1))


def _is_model(name: str) -> bool:
    base = name.rpartition("/")[2].lower()
    if not base.endswith(".gguf") or is_projector(name) or later_part(name):
        return False
    # A matrix of importances, a vocabulary, a draft head: GGUF files, but not models.
    return not (base.startswith(("ggml-vocab", "mtp-")) or "imatrix" in base)


def _named(by_name: dict[str, RemoteFile], file: str) -> RemoteFile:
    found = by_name.get(file)
    if found is None:
        raise NoSuchModel(f"there is no file {file} in it; {_there(by_name)}")
    if later_part(file):
        raise NoSuchModel(f"{file} isn't the first part of its model: name {part_names(file)[0]}")
    return found


def _of_quant(by_name: dict[str, RemoteFile], quant: str | None) -> RemoteFile:
    models = [one for name, one in by_name.items() if _is_model(name)]
    if not models:
        raise NoSuchModel("there is no GGUF model in it: look for a repository whose name ends in -GGUF")
    for wanted in _USUAL if quant is None else (quant,):
        matching = [one for one in models if _has_quant(one.name, wanted)]
        if matching:
            # The plain one before a variant of it (UD-Q4_K_M), and the shortest name before any other.
            return min(
                matching, key=lambda one: (quant_of(one.name) != wanted.upper(), len(one.name), one.name)
            )
    if quant is None:
        return min(models, key=lambda one: one.name)
    raise NoSuchModel(f"there is no {quant} in it; {_there(by_name)}")


def _has_quant(name: str, wanted: str) -> bool:
    stem, wanted = _stem(name).lower(), wanted.lower()
    return any(
        part == wanted or (part.endswith(wanted) and part[-len(wanted) - 1] in "-._")
        for part in stem.split("/")
    )


def _stem(name: str) -> str:
    stem = name.removesuffix(".gguf")
    found = _PART.fullmatch(stem)
    return found["stem"] if found else stem


def _parts(by_name: dict[str, RemoteFile], first: RemoteFile) -> tuple[RemoteFile, ...]:
    names = part_names(first.name)
    missing = [name for name in names if name not in by_name]
    if missing:
        raise NoSuchModel(f"{first.name} is one of {len(names)} parts, and {missing[0]} isn't in it")
    return tuple(by_name[name] for name in names)


def _projector(by_name: dict[str, RemoteFile], model: RemoteFile) -> RemoteFile | None:
    """The projector that lies nearest to the model: in its own folder, else in one above it."""
    folders = model.name.split("/")[:-1]
    for depth in range(len(folders), -1, -1):
        folder = "/".join(folders[:depth])
        here = [one for one in by_name.values() if is_projector(one.name) and _folder(one.name) == folder]
        if here:
            return min(here, key=_projector_rank)
    return None


def _projector_rank(one: RemoteFile) -> tuple[int, str]:
    quant = quant_of(one.name)
    return (_PROJECTORS.index(quant) if quant in _PROJECTORS else len(_PROJECTORS)), one.name


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _there(by_name: dict[str, RemoteFile]) -> str:
    known = quants(by_name.values())
    names: Sequence[str] = known or [name for name in by_name if _is_model(name)]
    if not names:
        return "it holds no GGUF model"
    more = f", and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else ""
    return f"it has {', '.join(names[:_NAMED_AT_MOST])}{more}"
