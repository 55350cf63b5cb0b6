"""The README's examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

EXAMPLES = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def question(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the file that the examples listen to."""
    from lyra_model.audio import save_audio
    from lyra_model.voices import speak

    folder = tmp_path_factory.mktemp("readme")
    save_audio(folder / "question.wav", *speak("What is the capital of France?", "piper:joe"))
    return folder


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example(number: int, question: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(question)
    exec(EXAMPLES[number], {})
