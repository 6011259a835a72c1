"""What the documentation says works: its programs run, its commands and make targets exist."""

from __future__ import annotations

import doctest
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import typer

from fastseq.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, *languages: str) -> list[str]:
    """The code of a page in these languages, in order."""
    return [
        dedent(code)
        for _, language, code in FENCED.findall(page.read_text())
        if language in languages
    ]


def pages_with(*languages: str) -> list:
    return [pytest.param(p, id=p.name) for p in PAGES if blocks(p, *languages)]


@pytest.mark.parametrize("page", pages_with("python", "pycon"))
def test_programs_run(page):
    """All of a page in one namespace, from top to bottom."""
    names: dict = {"__name__": "documentation"}
    runner = doctest.DocTestRunner()
    for number, code in enumerate(blocks(page, "python", "pycon"), 1):
        where = f"{page.name}, program {number}"
        if code.startswith(">>>"):
            example = doctest.DocTestParser().get_doctest(code, names, where, None, None)
            runner.run(example, clear_globs=False)
            names.update(example.globs)
        else:
            exec(compile(code, where, "exec"), names)
    assert not runner.failures


@pytest.mark.parametrize("trainer", ["lightning", "accelerate"])
def test_examples_run(trainer):
    if importlib.util.find_spec(trainer) is None:
        pytest.skip(f"{trainer} is not installed")
    script = ROOT / "docs" / "examples" / f"with_{trainer}.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"loss 0\.\d+", done.stdout.strip().splitlines()[-1]), done.stdout


def commands(page: Path) -> list[str]:
    """Command lines of a page: in shell blocks, and in the README's indented ones."""
    indented = re.sub(r"\\\n", " ", page.read_text())
    lines = [
        *re.sub(r"\\\n", " ", "".join(blocks(page, "sh"))).splitlines(),
        *re.findall(r"^    (\S.*)$", indented, re.M),
    ]
    commands = (line.partition("#")[0].strip() for line in lines)
    return [line for line in commands if line.startswith(("make ", "fastseq ", "torchrun "))]


def test_commands_exist():
    parsers = typer.main.get_command(app).commands
    known = {name: {o for p in c.params for o in p.opts} for name, c in parsers.items()}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    seen = set()
    for page in PAGES:
        for line in commands(page):
            words = shlex.split(line)
            if words[:1] == ["make"]:
                assert words[1] in targets, f"{page.name}: {line}"
                seen.add("make")
            for program in ("fastseq", "fastseq.cli"):
                if program not in words:
                    continue
                command, *rest = words[words.index(program) + 1 :]
                options = {word for word in rest if word.startswith("--")}
                assert command in known, f"{page.name}: {line}"
                assert options <= known[command] | {"--help"}, f"{page.name}: {line}"
                seen.add(program)
    assert seen == {"make", "fastseq", "fastseq.cli"}


def test_files_named_exist():
    """Paths in backticks, and links between pages."""
    for page in PAGES:
        text = page.read_text()
        named = re.findall(r"`((?:benchmarks|csrc|docs|fastseq|kernels|tests)/[\w./]+)`", text)
        for path in named:
            assert (ROOT / path).exists(), f"{page.name} names {path}"
        for target in re.findall(r"\]\((\w+\.md)\)", text):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
