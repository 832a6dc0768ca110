"""What the pages and the README name exists: functions, arguments, commands, flags, files."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import shlex
from pathlib import Path

import pytest

import tf_kfacprune as kp
from tf_kfacprune.cli import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CALL = re.compile(r"\bkp\.[\w.]+\((?:[^()`]|\([^()`]*\))*\)")
COMMAND = re.compile(r"\bkfacprune (\w+)([^`\n|]*)")
# Words that follow the program's name in a sentence, or stand for any command.
NO_COMMANDS = {"COMMAND"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_name_of_the_library_exists(page):
    for path in set(re.findall(r"\bkp((?:\.\w+)+)", page.read_text(encoding="utf-8"))):
        functools.reduce(getattr, path.strip(".").split("."), kp)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_argument_of_a_call_exists(page):
    for text in CALL.findall(page.read_text(encoding="utf-8")):
        call = ast.parse(text.replace("...)", ")").replace("=)", "=1)"), mode="eval").body
        path = ast.unparse(call.func).split(".")[1:]
        parameters = inspect.signature(functools.reduce(getattr, path, kp)).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for keyword in call.keywords:
            assert takes_any or keyword.arg in parameters, text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_flag_of_a_command_exists(page):
    for name, rest in COMMAND.findall(page.read_text(encoding="utf-8")):
        if name in NO_COMMANDS or not rest.lstrip().startswith("--"):
            continue
        flags = main._COMMANDS[name]().flags
        for word in shlex.split(rest, comments=True):
            if word.startswith("--"):
                assert word[2:].split("=")[0] in flags, f"kfacprune {name} {word}"
