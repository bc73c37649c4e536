"""Bad input through the command: exit status, message, no traceback, nothing written that was not asked for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from napari_resfinetune.cli.app import app

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import bad_input

# A process of its own costs seconds; these three show that the installed command behaves as the verbs called here.
IN_A_PROCESS = ("images and labels swapped", "unknown option", "output with files in it")


def by_name(name: str) -> bad_input.Case:
    (case,) = (case for case in bad_input.CASES if case.tried == name)
    return case


def run_here(case: bad_input.Case) -> bad_input.Outcome:
    result = CliRunner().invoke(app, bad_input.arguments(case), catch_exceptions=False)
    return bad_input.Outcome(result.exit_code, result.stdout, result.stderr)


def attempt(case: bad_input.Case, folder: Path, run) -> list[str]:
    bad_input.prepare(case, folder)
    before = bad_input.contents(folder)
    outcome = run(case)
    found = bad_input.complaints(case, outcome, before, bad_input.contents(folder))
    return [*found, outcome.stderr, outcome.stdout] if found else []


@pytest.mark.parametrize("case", bad_input.CASES, ids=lambda case: case.tried)
def test_bad_input_is_refused_in_words(case, tmp_path, monkeypatch):
    if bad_input.skipped(case):
        pytest.skip(f"needs {case.needs}")
    monkeypatch.chdir(tmp_path)
    assert not attempt(case, tmp_path, run_here)


@pytest.mark.parametrize("name", IN_A_PROCESS)
def test_the_installed_command_does_the_same(name, tmp_path):
    assert not attempt(by_name(name), tmp_path, lambda case: bad_input.run_command(case, tmp_path))


def test_there_is_a_table_of_all_cases():
    page = bad_input.PAGE.read_text(encoding="utf-8")
    assert [case.tried for case in bad_input.CASES if f"| {case.tried} |" not in page] == []


def test_names_are_distinct():
    names = [case.tried for case in bad_input.CASES]
    assert len(names) == len(set(names)) >= 30
