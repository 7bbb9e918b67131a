"""The generation seam: slot keywords into `generate()`, the store into its cache preparation.

`generate` and `_prepare_cache_for_generation` are bound to the instance as module-level functions,
which deepcopy rebinds to the copy. Everything else is transformers' own generation.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation.configuration_utils import GenerationConfig, GenerationMode

from patchkit import engine
from patchkit.attention.store import KVStore, check_cache
from patchkit.backends import Backend
from patchkit.compat import CACHE_KEYWORD, CHUNKED_PREFILL_IGNORES_CACHE, find_cache
from patchkit.errors import (
    CacheError,
    MethodConflictError,
    NoMatchingModuleError,
    UnsupportedGenerationError,
)
from patchkit.families import Family
from patchkit.method import Method, as_slot_value, slot_names
from patchkit.patch import ActiveCall
from patchkit.prefill import new_tokens, prefill_chunk_size

if TYPE_CHECKING:
    from patchkit.patch import Patch

_SIGNATURE = inspect.signature(GenerationMixin.generate)


@dataclass(frozen=True)
class Call:
    """What a method may know about one `generate()` call.

    Attributes:
        model: The patched model.
        tokenizer: The tokenizer passed to `generate(tokenizer=...)`, if any.
        backend: Runs kernels for this model.
    """

    model: PreTrainedModel
    tokenizer: Any
    backend: Backend


@functools.wraps(GenerationMixin.generate)
def generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    patch: Patch = self.__dict__["_patchkit"]
    with patch.lock:
        return _generate(self, patch, args, kwargs)


def _generate(
    self: PreTrainedModel, patch: Patch, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    overrides = {slot: kwargs.pop(slot) for slot in slot_names() & kwargs.keys()}
    bound = _SIGNATURE.bind_partial(self, *args, **kwargs)
    given = {**bound.arguments.get("kwargs", {}), **bound.arguments}
    call = Call(model=self, tokenizer=given.get("tokenizer"), backend=patch.backend)
    methods = _methods_of_call(patch, overrides, call)
    _refuse_cache(self, given, methods, explicit="kv_eviction" in overrides)
    processors = [method.logits_processor(call) for method in _unique(methods)]
    processors = [processor for processor in processors if processor is not None]
    if processors:
        own = given.get("logits_processor") or ()
        bound.arguments["logits_processor"] = LogitsProcessorList([*own, *processors])
    served = engine.serves(self, given)
    if served:
        bound.arguments["custom_generate"] = engine.decode
    original = patch.journal.original(self, "generate")
    with patch.call(ActiveCall(methods, given.get("streamer"), call.tokenizer, served)):
        return original(*bound.args[1:], **bound.kwargs)


def prepare_cache_for_generation(
    self: PreTrainedModel,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    generation_mode: GenerationMode,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Let transformers decide about the cache, then put a `KVStore` where it made a default one."""
    patch: Patch = self.__dict__["_patchkit"]
    given = model_kwargs.get(CACHE_KEYWORD)
    _refuse_mode(patch, generation_config, generation_mode, given)
    if given is None:
        # What remains here is the default of the checkpoint; the call itself asked for none.
        generation_config.cache_implementation = None
    original = patch.journal.original(self, "_prepare_cache_for_generation")
    original(generation_config, model_kwargs, generation_mode, *args, **kwargs)
    if given is None and type(model_kwargs.get(CACHE_KEYWORD)) is DynamicCache:
        store = None
        if patch.running.served and not generation_config.is_assistant:
            store = engine.take_parked(patch, patch.active().get("kv_eviction"))
        if store is None:
            store = KVStore(self)
        if generation_config.is_assistant:
            store.activate_past_recording()
        model_kwargs[CACHE_KEYWORD] = store


def prefill(
    self: PreTrainedModel,
    input_ids: Tensor,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Feed a prompt in chunks where its activations would take too much memory at once."""
    patch: Patch = self.__dict__["_patchkit"]
    original = patch.journal.original(self, "_prefill")
    store = model_kwargs.get(CACHE_KEYWORD)
    if not isinstance(store, KVStore):
        return original(input_ids, generation_config, model_kwargs, *args, **kwargs)
    if generation_config.prefill_chunk_size is None:
        chunk = prefill_chunk_size(self, store, input_ids, generation_config, model_kwargs)
        generation_config.prefill_chunk_size = chunk
    with store.expecting(new_tokens(store, input_ids)):
        return original(input_ids, generation_config, model_kwargs, *args, **kwargs)


def get_stopping_criteria(
    self: PreTrainedModel,
    generation_config: GenerationConfig,
    stopping_criteria: StoppingCriteriaList | None,
    tokenizer: Any = None,
    **kwargs: Any,
) -> StoppingCriteriaList:
    """Bring the tokenizer for `stop_strings`, which `custom_generate` makes transformers drop."""
    patch: Patch = self.__dict__["_patchkit"]
    original = patch.journal.original(self, "_get_stopping_criteria")
    tokenizer = patch.running.tokenizer if tokenizer is None else tokenizer
    return original(generation_config, stopping_criteria, tokenizer=tokenizer, **kwargs)


def _unique(methods: dict[str, Method]) -> list[Method]:
    return list({id(method): method for method in methods.values()}.values())


def _methods_of_call(patch: Patch, overrides: dict[str, Any], call: Call) -> dict[str, Method]:
    """Merge the slots of a call into the applied methods and check the newcomers."""
    methods = patch.applied()
    for slot, value in overrides.items():
        current = methods.get(slot)
        method = as_slot_value(slot, value, current)
        methods = {s: m for s, m in methods.items() if m is not current}
        if method is None:
            continue
        method = method.for_call(call)
        if not check_method(method, methods, patch.family):
            raise NoMatchingModuleError(nothing_to_act_on(method, patch.family))
        methods |= dict.fromkeys(method.slots, method)
    return methods


def check_method(method: Method, others: dict[str, Method], family: Family) -> tuple[str, ...]:
    """Check that `method` fits beside `others` and the model; return the modules it acts on.

    Raises:
        MethodConflictError: a slot is taken, or one of the two refuses the other.
        PatchkitError, ValueError: whatever `Method.check` finds.
    """
    for slot, other in others.items():
        if slot in method.slots or slot in method.conflicts:
            raise MethodConflictError(
                f"{method.name} cannot be combined with {other.name}, which fills {slot!r}"
            )
        taken = set(other.conflicts) & set(method.slots)
        if taken:
            raise MethodConflictError(
                f"{other.name} cannot be combined with {method.name}, which fills {sorted(taken)}"
            )
    method.check(family)
    return method.sites(family)


def nothing_to_act_on(method: Method, family: Family) -> str:
    """Say that a method has no site."""
    return f"{method.name} found nothing to act on in {type(family.model).__name__}"


def _refuse_cache(
    model: PreTrainedModel, given: dict[str, Any], methods: dict[str, Method], explicit: bool
) -> None:
    """Refuse, before anything runs, a cache that this call cannot use."""
    config = given.get("generation_config")
    asked = given.get("cache_implementation") or getattr(config, "cache_implementation", None)
    # Some checkpoints ship a static cache as their default; that is nobody's request.
    if asked not in (None, "dynamic", model.generation_config.cache_implementation):
        raise CacheError(
            f"a patched model keeps its own fixed-address KVStore; got cache_implementation="
            f"{asked!r}. Leave it out, or call patchkit.restore(model) first"
        )
    eviction = methods.get("kv_eviction")
    cache = find_cache(given)
    check_cache(cache, eviction)
    if explicit and isinstance(cache, KVStore) and cache.eviction != eviction:
        raise CacheError(
            f"the KVStore passed as past_key_values was made for kv_eviction={cache.eviction}, "
            f"got kv_eviction={eviction}"
        )


def _refuse_mode(
    patch: Patch, generation_config: GenerationConfig, mode: GenerationMode, cache: Cache | None
) -> None:
    eviction = cache.eviction if isinstance(cache, KVStore) else patch.active().get("kv_eviction")
    if eviction is not None and generation_config.use_cache is False:
        raise UnsupportedGenerationError(
            f"{eviction.name} bounds the KV cache, got use_cache=False; pass kv_eviction=None"
        )
    if eviction is not None and mode == GenerationMode.ASSISTED_GENERATION:
        raise UnsupportedGenerationError(
            f"{eviction.name} drops tokens that assisted decoding may have to take back; "
            "pass kv_eviction=None or decode without an assistant"
        )
    chunked = generation_config.prefill_chunk_size is not None
    if chunked and CHUNKED_PREFILL_IGNORES_CACHE and cache is not None and cache.get_seq_length():
        raise UnsupportedGenerationError(
            "prefill_chunk_size with a cache that already holds tokens needs transformers >= 5.23 "
            "(older versions feed the whole prompt again)"
        )
