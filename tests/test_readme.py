"""The README's first screen works, and CI runs what it promises."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from patchkit import demo
from patchkit.method import registry

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
SMALL = {
    "kv_eviction.py": ("--tokens", "320", "--budgets", "96"),
    "long_chat.py": ("--turns", "3", "--budget", "64"),
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


@pytest.mark.real
@pytest.mark.skipif(not demo.is_cached(), reason="the demo model is not in the cache")
def test_python_block_runs(capsys):
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "Paris" in printed
    assert "KV store" in printed


def test_every_method_is_in_the_table():
    for cls in registry().values():
        assert f"`{cls.__name__}(" in README
        assert all(f"`{slot}`" in README for slot in cls.slots)


def test_ci_runs_the_readmes_commands():
    script = (ROOT / ".ci" / "run").read_text()
    install_and_demo, install_and_test = blocks("bash")[:2]
    assert "python -m patchkit demo" in install_and_demo and "-m patchkit demo" in script
    assert "python -m pytest" in install_and_test and "-m pytest" in script


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.skipif(not demo.is_cached(), reason="the demo model is not in the cache")
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name):
    run = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *SMALL.get(name, ())],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert len(run.stdout) > 200
