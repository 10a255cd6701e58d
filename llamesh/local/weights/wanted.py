"""What a profile needs on the disk before it can start, and where that is once it is there."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass

from llamesh.config.cookbook import HubFile, ModelPath, Profile, UrlFile

# A profile that names its own projector, or wants none.
_PROJECTOR_FLAGS = frozenset({"-mm", "--mmproj", "-mmu", "--mmproj-url", "--no-mmproj", "--no-mmproj-auto"})


@dataclass(frozen=True, slots=True)
class Wanted:
    """Weights from elsewhere. `projector`: with the one for images, if the repository has one."""

    source: HubFile | UrlFile
    projector: bool = False

    @property
    def name(self) -> str:
        """For people: `owner/name:Q4_K_M`, `owner/name/file.gguf`, or the address without its query."""
        source = self.source
        if isinstance(source, UrlFile):
            return source.url.partition("?")[0]
        return source.repo if source.file is None else f"{source.repo.partition(':')[0]}/{source.file}"

    @property
    def key(self) -> str:
        """Names the record of these weights: the same for the same wish."""
        text = json.dumps([type(self.source).__name__, dataclasses.asdict(self.source), self.projector])
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Found:
    """Weights on this disk: the path of the model (of its first part), and of its projector if it has one."""

    model: str
    projector: str | None = None


def wanted_of(profile: Profile) -> Wanted | None:
    """What has to be fetched for the profile; None where its model is a path, or llama-server's own
    affair.
    """
    source = profile.source
    if isinstance(source, UrlFile):
        return Wanted(source)
    if isinstance(source, HubFile):
        flags = {
            f"--{word[2:].replace('_', '-')}" if word.startswith("--") else word for word in profile.arguments
        }
        return Wanted(source, profile.kind == "text" and flags.isdisjoint(_PROJECTOR_FLAGS))
    return None


def with_weights(profile: Profile, found: Found) -> Profile:
    """The profile as one of a file on this machine."""
    arguments = profile.arguments
    if found.projector is not None:
        arguments = (*arguments, "--mmproj", found.projector)
    return dataclasses.replace(profile, source=ModelPath(found.model), arguments=arguments)
