"""The examples of the README, and of those pages that need no model, run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

EXAMPLES = {
    f"{page}-{number}": example
    for page in ("README.md", "docs/soft_dtw.md")
    for number, example in enumerate(
        re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / page).read_text(), re.DOTALL)
    )
}


@pytest.fixture(scope="module")
def question(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the file that the examples listen to."""
    from lyra_model.audio import save_audio
    from lyra_model.voices import speak

    folder = tmp_path_factory.mktemp("readme")
    save_audio(folder / "question.wav", *speak("What is the capital of France?", "piper:joe"))
    return folder


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, question: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(question)
    exec(EXAMPLES[name], {})
