"""Machines for the doctor: settings from data, and a root that is a folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from llamesh.commands.doctor.finding import Finding, Patient
from llamesh.commands.shared.options import Files
from llamesh.config.check import load_files

#: Of no use to anybody, and nowhere else in what the doctor could say.
SECRET = "s3cret-0123456789"


def patient(folder: Path, config: dict[str, Any] | None = None, cookbook: Any = None, **more: Any) -> Patient:
    """A node of these files, with keys and downloads below `folder`, where the rest of the machine is
    missing."""
    noise = {"config_dir": str(folder / "keys")}
    document = {"metrics_path": str(folder / "metrics.json"), **(config or {})}
    cluster = document.get("cluster", {})
    document["cluster"] = {**cluster, "noise": {**noise, **cluster.get("noise", {})}}
    paths = Files.named(folder / "config.yaml", folder / "secrets.yaml", folder / "cookbook.yaml")
    paths.config.write_text(json.dumps(document))
    paths.cookbook.write_text(json.dumps({"models": cookbook or []}))
    settings, recipes = load_files(paths.config, paths.cookbook, None, {})
    environ = {"PATH": os.defpath, "HF_HOME": str(folder / "hub"), "HOME": str(folder)}
    environ |= more.pop("environ", {})
    root = folder / "root"
    root.mkdir(exist_ok=True)
    return Patient(paths, environ, settings, recipes, root=root, **more)


def said(found: list[Finding]) -> str:
    """All of it, a line each."""
    return "\n".join(f"{one.level} {one.text} -> {one.remedy}" for one in found)


def script(folder: Path, name: str, text: str) -> str:
    """A program of this name, and the folder for PATH that it lies in."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return f"{folder}{os.pathsep}{os.defpath}"
