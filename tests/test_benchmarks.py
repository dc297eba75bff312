"""The runner of the benchmarks: a program that fails or hangs does not stop the others."""

import importlib.util
import io
import pathlib
import sys

FOLDER = pathlib.Path(__file__).parent.parent / "benchmarks"


def load(monkeypatch, folder):
    spec = importlib.util.spec_from_file_location("run_all", FOLDER / "run_all.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "run_all", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "HERE", folder)
    return module


def test_every_end_is_told(monkeypatch, tmp_path):
    run_all = load(monkeypatch, tmp_path)
    (tmp_path / "good.py").write_text("print('| a |')\nprint('| 1 |')\nprint('a machine')")
    (tmp_path / "bad.py").write_text("print('half way', flush=True)\nraise ValueError('no memory')")
    (tmp_path / "slow.py").write_text("import time; print('row', flush=True); time.sleep(600)")
    log = io.StringIO()
    outcomes = [
        run_all.run(run_all.Program("bad", "bad.py"), log),
        run_all.run(run_all.Program("slow", "slow.py", limit_s=4), log),
        run_all.run(run_all.Program("good", "good.py"), log),
        run_all.run(run_all.Program("late", "good.py"), log, left_s=3),
    ]
    found = [outcome.status for outcome in outcomes]
    assert found == ["failed (1)", "stopped after 4 s", "ok", "no time left"]
    assert "no memory" in log.getvalue() and "row" in log.getvalue()
    text = run_all.report(outcomes)
    assert "half way" in text and "| 1 |\n\na machine" in text


def test_the_scripts_are_there(monkeypatch):
    run_all = load(monkeypatch, FOLDER)
    for program in (*run_all.GPU, *run_all.CPU, *run_all.QUICK):
        assert (FOLDER / program.command.split()[0]).is_file()
