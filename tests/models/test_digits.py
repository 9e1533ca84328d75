"""Real data: a DLA network learns scikit-learn's handwritten digits, fused and unfused alike."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_digits.py"


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_digits", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_bad_arguments_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in (
        ("--steps 0", "--steps: expected a positive integer, not '0'"),
        ("--batch 0", "--batch: expected a positive integer, not '0'"),
        ("--model foo", "no model is called 'foo'"),
        ("--model resnet20_se --unfused", "'resnet20_se') has no option 'fused'"),
    ):
        monkeypatch.setattr("sys.argv", ["train_digits.py", *arguments.split()])
        with pytest.raises(SystemExit):
            example().main()
        assert words in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_digits(fused: bool, record_property: pytest.RecordProperty) -> None:
    accuracy = example().run(
        "resnet20_dla_l", steps=200, batch=24, lr=0.1, seed=0, spec="official", fused=fused
    )
    record_property("accuracy", accuracy)
    print(f"held-out accuracy {accuracy:.2%}")
    assert accuracy >= 0.97
