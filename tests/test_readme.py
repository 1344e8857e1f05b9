"""The README's Python runs as it stands, from top to bottom."""

import re
from pathlib import Path
from typing import Any

import pytest

import fastopt

README = Path(__file__).parent.parent / "README.md"


def blocks_of(kind: str) -> list[str]:
    """Fenced blocks of a language, or of none."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    return [text for language, text in fenced if language == kind]


def without_times(text: str) -> list[str]:
    """The lines of a report, but for what differs from run to run and from backend to backend."""
    return re.sub(r"[\d.,]+ (us|ms|s|MB/s|GB/s)\b", "some", text).replace("(python)", "(native)").splitlines()


@pytest.mark.usefixtures("backend")
def test_the_blocks_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    blocks = blocks_of("python")
    assert len(blocks) == 10
    try:
        for number, block in enumerate(blocks, start=1):
            exec(compile(block, f"block {number} of {README.name}", "exec"), namespace)
    finally:
        fastopt.uninstall()
    [sample] = blocks_of("")
    assert without_times(capsys.readouterr().out) == without_times(sample)


def test_the_first_block_needs_no_other_and_is_short() -> None:
    first = blocks_of("python")[0]
    assert len([line for line in first.splitlines() if line]) <= 15
