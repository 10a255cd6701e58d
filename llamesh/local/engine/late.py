"""Flag values that can exist only once xllamacpp is imported: enums, adapters, arrays of a fixed length.

The command line is checked before the engine (34 MB of library) is loaded, so such a value waits as a
`Late` and is resolved against the binding and what the parameter holds already.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any


class BadValue(Exception):
    """A flag's value can't be used; the text says what would be right."""


class Late(ABC):
    """A value that exists only once the binding does."""

    @abstractmethod
    def resolve(self, binding: Any, current: Any) -> object:
        """The binding's form of it. `current` is what the parameter holds now."""


@dataclass(frozen=True)
class Member(Late):
    """A member of one of the binding's enums."""

    enum: str
    name: str

    def resolve(self, binding: Any, current: Any) -> object:
        return getattr(getattr(binding, self.enum), self.name)


@dataclass(frozen=True)
class Lora(Late):
    """A LoRA adapter file with its scale."""

    path: str
    scale: float

    def resolve(self, binding: Any, current: Any) -> object:
        return binding.CommonAdapterLoraInfo(self.path, self.scale)


@dataclass(frozen=True)
class Grammar(Late):
    """A GBNF grammar, or a JSON schema that the binding turns into one."""

    text: str
    schema: bool

    def resolve(self, binding: Any, current: Any) -> object:
        kinds = binding.common_grammar_type
        if self.schema:
            text = binding.json_schema_to_grammar(json.loads(self.text))
            return binding.CommonGrammar(kinds.COMMON_GRAMMAR_TYPE_OUTPUT_FORMAT, text)
        return binding.CommonGrammar(kinds.COMMON_GRAMMAR_TYPE_USER, self.text)


@dataclass(frozen=True)
class CpuMask(Late):
    """A set of CPUs as bits, CPU 0 in the lowest; masks and ranges of one command line add up."""

    bits: int

    def __or__(self, other: CpuMask) -> CpuMask:
        return CpuMask(self.bits | other.bits)

    def resolve(self, binding: Any, current: Any) -> object:
        length = len(current)
        if self.bits.bit_length() > length:
            raise BadValue(f"CPUs are numbered from 0 to {length - 1}")
        return [bool(self.bits >> cpu & 1) for cpu in range(length)]


@dataclass(frozen=True)
class Shares(Late):
    """One number per device; devices that aren't named get `rest`, or the one number if it is alone."""

    numbers: tuple[float, ...]
    broadcast: bool

    def resolve(self, binding: Any, current: Any) -> object:
        if len(self.numbers) >= len(current):
            raise BadValue(f"at most {len(current) - 1} devices")
        if self.broadcast and len(self.numbers) == 1:
            return list(self.numbers) * len(current)
        rest = current[len(self.numbers) :] if self.broadcast else [0.0] * (len(current) - len(self.numbers))
        return [*self.numbers, *rest]


@dataclass(frozen=True)
class Overrides(Late):
    """Which tensors (by a pattern of their name) live in which buffer type: `PATTERN=TYPE`."""

    entries: tuple[str, ...]

    def __or__(self, other: Overrides) -> Overrides:
        return Overrides(self.entries + other.entries)

    def resolve(self, binding: Any, current: Any) -> object:
        return ",".join(self.entries)


@dataclass(frozen=True)
class SamplingMarks(Late):
    """Which sampling settings the user chose: llama.cpp lets a model file set those that he didn't."""

    names: frozenset[str]

    def __or__(self, other: SamplingMarks) -> SamplingMarks:
        return SamplingMarks(self.names | other.names)

    def resolve(self, binding: Any, current: Any) -> object:
        bits = binding.common_params_sampling_config
        return sum(int(getattr(bits, f"COMMON_PARAMS_SAMPLING_CONFIG_{name}").value) for name in self.names)
