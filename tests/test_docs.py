"""The documents name what is there: links, files, commands, and the words of the glossary."""

from __future__ import annotations

import argparse
import re
import subprocess
from pathlib import Path

import pytest

from pdray.cli import build_parser

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("pdray", "actors", "kernels", "tests", "configs", "examples", "docs", ".ci", ".github")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
ENTRY = re.compile(r"^- \*\*([^*]+)\*\*", re.MULTILINE)
OUR_PATH = re.compile(rf"(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./*-]*|[\w-]+\.(?:md|cfg|toml|yaml)|Makefile")
COMMAND = re.compile(r"\bpdray ([a-z]+)(?: ([a-z]+))?")


def documents() -> list[str]:
    """Every Markdown file that git knows, or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    return [name for name in listed.stdout.split() if (ROOT / name).exists()]


def prose(text: str) -> str:
    """A document without its code blocks."""
    return FENCED.sub("", text)


def anchors(text: str) -> set[str]:
    """The fragments by which a document's headings are linked to, as code hosts make them."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(prose(text))}


def broken_links(document: Path) -> list[str]:
    """Relative links that lead to no file, or to no heading of it."""
    broken = []
    for target in LINK.findall(prose(document.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, fragment = target.partition("#")
        path = document.parent / name if name else document
        if not path.exists() or (fragment and fragment not in anchors(path.read_text())):
            broken.append(target)
    return broken


def missing_paths(document: Path) -> list[str]:
    """Paths of this repository in backticks that do not exist; a pattern must match something."""
    missing = []
    for code in CODE.findall(prose(document.read_text())):
        for word in code.split():
            if OUR_PATH.fullmatch(word) and not any(ROOT.glob(word)) and not any(document.parent.glob(word)):
                missing.append(word)
    return missing


def commands() -> set[str]:
    """`serve`, `bench`, `bench serve`, ...: every command of the parser."""

    def walk(parser: argparse.ArgumentParser) -> set[str]:
        found = set()
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, child in action.choices.items():
                    found |= {name} | {f"{name} {inner}" for inner in walk(child)}
        return found

    return walk(build_parser())


def unknown_commands(text: str) -> list[str]:
    """`pdray X` in code, of a document, where the parser knows no X; `pdray bench X` likewise."""
    known, unknown = commands(), []
    code = FENCED.findall(text) + CODE.findall(prose(text))
    for line in "\n".join(code).splitlines():
        for first, second in COMMAND.findall(line):
            if first not in known or (first == "bench" and second and f"bench {second}" not in known):
                unknown.append(f"pdray {first} {second}".strip())
    return unknown


@pytest.mark.parametrize("name", documents())
def test_documents_name_what_is_there(name: str) -> None:
    document = ROOT / name
    assert broken_links(document) == []
    if name not in ("CHANGELOG.md", "docs/journal.md"):  # they speak of what was
        assert missing_paths(document) == []
        assert unknown_commands(document.read_text()) == []


def test_the_checks_find_what_they_look_for(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text(
        "# A page: of one\n[a](page.md#a-page-of-one) [b](page.md#b) [c](no.md) `pdray/no.py` `kernels/*.py9`\n"
    )
    assert broken_links(document) == ["page.md#b", "no.md"]
    assert missing_paths(document) == ["pdray/no.py", "kernels/*.py9"]
    assert unknown_commands("`pdray bench offline`, `pdray bench no`\n```\npdray dance\n```\n") == [
        "pdray dance",
        "pdray bench no",
    ]


def test_every_document_is_reached_from_the_readme() -> None:
    seen: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        document = waiting.pop()
        if document in seen or document.suffix != ".md":
            continue
        seen.add(document)
        links = (target.partition("#")[0] for target in LINK.findall(prose(document.read_text())))
        waiting += [(document.parent / name).resolve() for name in links if name and ":" not in name]
    assert {ROOT / name for name in documents() if name.startswith("docs/")} <= seen


def test_the_glossary_has_the_private_words() -> None:
    """Compares the glossary with a list of the words, so that neither loses one unseen."""
    words = (ROOT / "docs/words.txt").read_text().split("\n")[:-1]
    entries = ENTRY.findall((ROOT / "docs/glossary.md").read_text())
    assert words == entries
    assert entries == sorted(set(entries), key=str.lower)


def test_the_glossary_has_no_word_that_the_code_has_lost() -> None:
    text = "\n".join(path.read_text() for top in ("pdray", "actors", "kernels") for path in (ROOT / top).rglob("*.py"))
    plain = re.sub(r"[-_\s]+", "", text.lower())
    for word in ENTRY.findall((ROOT / "docs/glossary.md").read_text()):
        assert re.sub(r"[-\s]+", "", word.lower()) in plain, word
