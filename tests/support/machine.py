"""A machine as the commands see it: a home directory with a config.yaml, nothing of the developer's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from llamesh.config.settings import load_settings
from llamesh.mesh.identity import Identity, load_identity
from llamesh.mesh.known_peers import KnownPeers
from tests.support.node import clean_environment

COMMAND = (sys.executable, "-m", "llamesh")


class Machine:
    """A machine: a folder that is its home, with a config.yaml."""

    def __init__(self, directory: Path, config: str) -> None:
        directory.mkdir(parents=True)
        self.directory = directory
        self.config = directory / "config.yaml"
        self.config.write_text(config)
        self.store = directory / ".llama-mesh"
        self.environment = clean_environment({"HOME": str(directory)})

    def run(
        self, *arguments: str, env: Mapping[str, str] | None = None, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*COMMAND, *arguments],
            cwd=self.directory,
            env={**self.environment, **(env or {})},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "Traceback" not in done.stderr
        return done

    def say(self, *arguments: str, env: Mapping[str, str] | None = None) -> str:
        """What the command prints to stdout, which must be one line."""
        done = self.run(*arguments, env=env)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\n") == 1
        return done.stdout.strip()

    def refuse(self, *arguments: str, env: Mapping[str, str] | None = None, stdin: str = "") -> str:
        """Why the command does nothing. It says so, and leaves every file as it was."""
        before = self.files()
        done = self.run(*arguments, env=env, stdin=stdin)
        assert done.returncode == 1, (done.stdout, done.stderr)
        assert done.stdout == ""
        assert self.files() == before
        return done.stderr

    def files(self) -> dict[str, bytes]:
        """Content of everything but locks and what Python leaves."""
        paths = [path for path in self.directory.rglob("*") if path.is_file() and path.suffix != ".lock"]
        return {str(path.relative_to(self.directory)): path.read_bytes() for path in paths}

    def identity(self) -> Identity:
        settings = load_settings(self.config, None, {})
        noise = settings.cluster.noise.model_copy(update={"config_dir": self.store})
        cluster = settings.cluster.model_copy(update={"noise": noise})
        return load_identity(settings.model_copy(update={"cluster": cluster}), {})

    def pins(self) -> dict[str, bytes]:
        return dict(KnownPeers(self.store / "known_peers", (), True).pins())
