"""The command line, on a tiny model folder."""

from __future__ import annotations

import subprocess
import sys

import pytest

import patchkit
from patchkit import __main__ as cli
from patchkit.testing import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    tiny_model("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def fails(capsys, *argv):
    """Run a command that must fail as patchkit's errors do; return its one line.

    transformers may have drawn a progress bar before it.
    """
    assert cli.main(argv) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "Loading weights" not in line]
    (line,) = filter(None, lines)
    assert line.startswith("patchkit: error: ")
    return line


def test_methods_lists_every_method_on_one_line(capsys):
    assert cli.main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = patchkit.methods()
    assert len(lines) == 1 + len(rows) + 2
    for line, row in zip(lines[1:], rows, strict=False):
        assert line.split()[:4] == [row.name, row.config, row.area, row.slots[0]]
        assert (" exact " in line) == row.exact


def test_methods_shows_the_page_of_one(capsys):
    assert cli.main(["methods", "Window"]) == 0
    page = next(row.page for row in patchkit.methods() if row.name == "window")
    assert capsys.readouterr().out == page + "\n"


def test_unknown_method_is_one_line_with_the_nearest_names(capsys):
    assert "['window']" in fails(capsys, "methods", "windwo")


def test_report_shows_the_methods_with_their_fields(folder, capsys):
    argv = ["report", "--model", folder, "--method", "window:budget=12,num_sink_tokens=3"]
    assert cli.main([*argv, "--method", "tip:reflection_tokens=(5,6)"]) == 0
    out = capsys.readouterr().out
    assert "LlamaForCausalLM" in out
    assert "Window(budget=12, num_sink_tokens=3, budget_bytes=None)" in out
    assert "TIP(" in out


def test_report_without_methods_is_exact(folder, capsys):
    assert cli.main(["report", "--model", folder]) == 0
    assert "approximate" not in capsys.readouterr().out


def test_demo_prints_both_answers_the_figures_and_the_report(folder, capsys):
    assert cli.main(["demo", "--model", folder, "--prompt", "Hi", "--max-new-tokens", "5"]) == 0
    out = capsys.readouterr().out
    assert "prompt: 2 tokens, greedy, float32 on" in out
    before, after = (
        out.split(f"--- {side} ---\n")[1].split("\n\n")[0] for side in ("before", "after")
    )
    assert before == after
    assert "Both answers are equal, token by token." in out
    figures = [line.split() for line in out.splitlines() if line.startswith(("before", "after"))]
    assert [row[-1] for row in figures] == ["5", "5"]
    # 2 layers, K and V, 2 KV heads, 2 + 4 tokens, head dim 16, 4 bytes
    assert figures[0][3] == f"{2 * 2 * 2 * 6 * 16 * 4:,}"
    assert "answers" in out.split("token by token.")[1]


def test_demo_says_that_an_approximate_method_may_differ(folder, capsys):
    argv = ["demo", "--model", folder, "--prompt", "Once upon a time", "--max-new-tokens", "24"]
    assert cli.main([*argv, "--method", "window:budget=5,num_sink_tokens=1"]) == 0
    assert "then they differ; that is expected of an approximate method." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            "window:size=3",
            r"window has no field ['size'], it takes ['budget', 'num_sink_tokens', 'budget_bytes']",
        ),
        ("window:budget=2", "budget must exceed num_sink_tokens=4, got 2"),
        ("window:budget", "expected NAME or NAME:FIELD=VALUE"),
        ("window:budget=", "expected NAME or NAME:FIELD=VALUE"),
        ("window:budget=a-b", "expected NAME or NAME:FIELD=VALUE"),
        ("window:budget=8,budget=9", "expected NAME or NAME:FIELD=VALUE"),
        ("window:budget=(8,9,10)", "expected one budget for each of 2 layers, got 3"),
        ("nothing", "unknown method 'nothing'"),
    ],
)
def test_bad_methods_are_one_line(folder, capsys, method, message):
    for command in ("report", "demo"):
        assert message in fails(capsys, command, "--model", folder, "--method", method)


def test_values_are_literals_and_bare_words_are_strings():
    method = cli._method("cyclic_reflex:amplitude=2.5,reflection_tokens=(1, 2),end_think=None")
    assert (method.amplitude, method.reflection_tokens) == (2.5, (1, 2))
    assert method.end_think is None
    assert cli._method("cyclic_reflex:reflection_tokens=paper").reflection_tokens == "paper"


def test_conflicting_methods_and_missing_models_are_one_line(folder, capsys):
    both = ("--method", "window", "--method", "window:budget=64")
    assert "cannot be combined" in fails(capsys, "report", "--model", folder, *both)
    assert "no/such/place" in fails(capsys, "report", "--model", f"{folder}/no/such/place")
    assert "at least 1, got 0" in fails(capsys, "demo", "--model", folder, "--max-new-tokens", "0")


def test_bench_lists_runs_and_explains(tmp_path, monkeypatch, capsys):
    module = tmp_path / "src" / "patchkit" / "__main__.py"
    monkeypatch.setattr(cli, "__file__", str(module))
    assert "source checkout" in fails(capsys, "bench")

    benchmarks = tmp_path / "examples" / "benchmarks"
    benchmarks.mkdir(parents=True)
    script = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(sys.argv[2]); sys.exit(3)"
    (benchmarks / "bench_store.py").write_text(script)
    (benchmarks / "helpers.py").write_text("")
    assert cli.main(["bench"]) == 0
    assert capsys.readouterr().out == "store\n"
    written = tmp_path / "written"
    assert cli.main(["bench", "store", str(written), "--steps=4"]) == 3
    assert written.read_text() == "--steps=4"
    assert "there is no benchmark 'stor', only ['store']" in fails(capsys, "bench", "stor")


def test_library_logging_is_shown_and_left_as_it_was(folder, capsys, monkeypatch):
    import logging

    from patchkit import demo

    load = demo.load

    def talkative(name):
        logging.getLogger("patchkit.demo").info("fetching 93 MB")
        return load(name)

    monkeypatch.setattr(demo, "load", talkative)
    logger = logging.getLogger("patchkit")
    before = (logger.level, list(logger.handlers), logger.propagate)
    assert cli.main(["report", "--model", folder]) == 0
    assert "fetching 93 MB\n" in capsys.readouterr().out
    assert (logger.level, logger.handlers, logger.propagate) == before


def test_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "patchkit", "--help"], capture_output=True, text=True, check=True
    )
    assert "usage: patchkit" in done.stdout
    assert "python -m patchkit demo --method window:budget=128" in done.stdout
    assert subprocess.run([sys.executable, "-m", "patchkit"], capture_output=True).returncode == 2
