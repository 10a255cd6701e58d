"""`llamesh build`: build llama.cpp, and have nodes use it."""

from __future__ import annotations

import os

import click

from llamesh.commands.shared.options import Files, files_options
from llamesh.commands.shared.options import command as make


@make(
    ("llamesh build", "for the best backend that can be built here"),
    ("llamesh build --backend cuda --branch b11434", "this one, of that release"),
    ("llamesh build --prebuilt", "without a compiler"),
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "cpu", "cuda", "metal", "vulkan", "hip"]),
    help="what computes; auto: the best that can be built on this machine",
)
@click.option(
    "--repo-url", metavar="SOURCE", help="a git repository, or a folder or an archive with the source"
)
@click.option("--branch", metavar="NAME", help="a branch, a tag or a commit")
@click.option(
    "--prebuilt", is_flag=True, help="install a release of llama.cpp, checked by sha256, instead of compiling"
)
@click.option("--force", is_flag=True, help="build even what is built already")
@files_options()
def command(
    backend: str | None, repo_url: str | None, branch: str | None, prebuilt: bool, force: bool, files: Files
) -> int:
    """Build llama.cpp as the section llama_cpp of the configuration says, test it, and make it the engine.

    A node that runs takes it over. Prints the path of the engine. When anything goes wrong, the engine in
    use stays.
    """
    from llamesh.local.builds.terminal import Wanted, build

    wanted = Wanted(backend, repo_url, branch, prebuilt, force)
    return build(files.settings().llama_cpp, wanted, os.environ)
