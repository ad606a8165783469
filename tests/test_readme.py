"""The README's example runs as it stands, and prints what it says."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def test_examples(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    code = "".join(blocks)  # each goes on from those before
    promised = re.findall(r"^print\(.*?\)  # (.*)$", code, re.MULTILINE)
    exec(code, {})
    assert capsys.readouterr().out.splitlines() == promised
    assert promised
