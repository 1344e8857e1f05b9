"""The Python of README and docs runs as it stands, from top to bottom, and prints what the pages say."""

import re
from pathlib import Path
from typing import Any

import pytest

import fastopt

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def blocks_of(page: Path, kind: str) -> list[str]:
    """Fenced blocks of a language, or of none."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [text for language, text in fenced if language == kind]


def without_times(text: str) -> list[str]:
    """The lines of a report, but for what differs from run to run and from backend to backend."""
    return re.sub(r"[\d.,]+ (us|ms|s|MB/s|GB/s)\b", "some", text).replace("(python)", "(native)").splitlines()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page, "python")], ids=lambda page: page.name)
def test_the_blocks_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    blocks = blocks_of(page, "python")
    assert len(blocks) >= (10 if page == README else 1)
    try:
        for number, block in enumerate(blocks, start=1):
            exec(compile(block, f"block {number} of {page.name}", "exec"), namespace)
    finally:
        fastopt.uninstall()
    printed = "".join(blocks_of(page, ""))
    assert without_times(capsys.readouterr().out) == without_times(printed)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert links
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_first_block_needs_no_other_and_is_short() -> None:
    first = blocks_of(README, "python")[0]
    assert len([line for line in first.splitlines() if line]) <= 15
