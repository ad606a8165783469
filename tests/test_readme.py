"""The README's example runs as it stands, and prints what it says."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def test_example(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    promised = re.findall(r"^print\(.*?\)  # (.*)$", code, re.MULTILINE)
    exec(code, {})
    assert capsys.readouterr().out.splitlines() == promised
    assert promised
