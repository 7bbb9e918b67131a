"""The decoding loop of a patched model on a GPU: one CUDA-graph replay per token.

`generate()` prepares everything as it always does, then calls `decode` instead of its own sampling
loop. The prompt runs through the model's forward; every further token is one replay of a recorded
step (`step_graph`), after which the next token is chosen on the device (`token_choice`). The host
queues steps ahead of the device and learns a few steps late that all rows are finished; what was
computed past that point is taken back and never shown.

A call that cannot be served this way runs transformers' own loop over the same store, and the
report says why.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import (
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput, GenerationConfig, GenerationMode
from transformers.generation.utils import GENERATION_MODES_MAPPING
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

from patchkit.attention.store import KVStore
from patchkit.attention.store_layer import BUCKET
from patchkit.compat import CACHE_KEYWORD
from patchkit.decoding.eligibility import global_hooks
from patchkit.outbox import History, Outbox
from patchkit.prefill import new_tokens
from patchkit.step_graph import RESERVE, StepGraph
from patchkit.token_choice import TokenChoice

if TYPE_CHECKING:
    from patchkit.method import Method
    from patchkit.patch import Patch

logger = logging.getLogger("patchkit")

RUN_AHEAD = 3
"""Steps that the host queues before it looks whether an earlier one finished every row."""

_DEVICES = ("cuda",)
_PARKED_SHARE = 0.1  # of the device memory, at most, stays allocated between calls
_MOST_COLUMNS = 1 << 18  # ids are kept for as many columns as the longest row may get
_RECORDERS = "transformers.utils.output_capturing"
_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
_PER_TOKEN = frozenset({"input_ids", "position_ids", "attention_mask", CACHE_KEYWORD})


def serves(model: PreTrainedModel, given: dict[str, Any]) -> bool:
    """Say whether a `generate()` call may be handed to `decode`: greedy or sampling, on a GPU.

    Args:
        model: The patched model.
        given: The arguments of the call.
    """
    if model.device.type not in _DEVICES or given.get("custom_generate") is not None:
        return False
    if given.get("synced_gpus") or is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model):
        return False
    config = GenerationConfig()
    own = getattr(given.get("generation_config"), "__dict__", {})
    for source in (model.generation_config.__dict__, own, given):
        for name, value in source.items():
            if value is not None and hasattr(config, name):
                setattr(config, name, value)
    mode = config.get_generation_mode(given.get("assistant_model"))
    return mode in _MODES and not config.token_healing


def decode(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> GenerateDecoderOnlyOutput | Tensor:
    """Generate as transformers' sampling loop does; the `custom_generate` of a patched model.

    Args:
        model: The patched model.
        input_ids: `[B, P]` int64.
        logits_processor: What `generate()` prepared; so are the remaining arguments.

    Returns:
        `[B, P + new]` int64, or the output object if `return_dict_in_generate`.

    Raises:
        RuntimeError: a row was to be sampled from probabilities that are NaN.
    """
    patch: Patch = model.__dict__["_patchkit"]
    lists = (logits_processor, stopping_criteria)
    limit = _limit(stopping_criteria, input_ids.shape[1])
    obstacle = _obstacle(model, patch, input_ids, limit, generation_config, model_kwargs)
    if obstacle is not None:
        if obstacle not in patch.host_loops:
            logger.warning("patchkit decodes through transformers' own loop: %s", obstacle)
        patch.host_loops[obstacle] += 1
        mode = generation_config.get_generation_mode()
        loop = getattr(type(model), GENERATION_MODES_MAPPING[mode])
        streamer = patch.running.streamer
        return loop(model, input_ids, *lists, generation_config, streamer=streamer, **model_kwargs)
    assert limit is not None
    on_its_device = (
        torch.cuda.device(model.device) if model.device.type == "cuda" else nullcontext()
    )
    with on_its_device:
        step = _step(model, patch, model_kwargs[CACHE_KEYWORD], input_ids.shape[0], limit)
        step.choice.begin(input_ids, *lists, generation_config)
        return _loop(model, patch, step, limit, input_ids, generation_config, model_kwargs)


def _loop(
    model: PreTrainedModel,
    patch: Patch,
    step: StepGraph,
    limit: int,
    input_ids: Tensor,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> GenerateDecoderOnlyOutput | Tensor:
    store, choice = step.store, step.choice
    prompt_length, remaining = choice.length, limit - choice.length
    returned = config.return_dict_in_generate
    history = History(choice, config)
    outbox = Outbox(choice, patch.running.streamer, bool(config.do_sample))
    # What an evicting store has dropped does not come back, and processors on the host must not see
    # tokens that do not belong to the answer: the last step must then be the last.
    evicts = any(layer.policy is not None for layer in store.store_layers)
    kept = returned or getattr(store, "_is_user_defined", False)
    run_ahead = 0 if kept and evicts or not choice.capturable else RUN_AHEAD

    with store.expecting(new_tokens(store, input_ids) + min(remaining, RESERVE)):
        outputs = model._prefill(input_ids, config, model_kwargs)
    model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
    logits = outputs.logits[:, -1].to(torch.float32, copy=True)
    del outputs
    choice.choose(logits)
    history.add(logits)
    choice.advance()
    outbox.push()
    remaining -= 1

    if remaining > 0 and not outbox.finished(run_ahead):
        inputs = _inputs_of_a_step(model, store, choice, model_kwargs)
        with model._optimize_model_for_decode():  # as a step was recorded, so it is compared
            step.begin(inputs, inputs.pop("position_ids"), remaining)
            while remaining > 0:
                step.run(remaining)
                history.add(step.logits)
                choice.advance()
                outbox.push()
                remaining -= 1
                if outbox.finished(run_ahead):
                    break
    answered = outbox.close()
    if kept:
        store.crop(answered - (choice.length - prompt_length))
    elif store.nbytes + choice.ids.nbytes <= _parking_bytes(store):
        patch.graphs.parked = step
    sequences = choice.sequences(prompt_length + answered)
    if not returned:
        return sequences
    return GenerateDecoderOnlyOutput(
        sequences=sequences, **history.cut(answered), **{CACHE_KEYWORD: store}
    )


def take_parked(patch: Patch, eviction: Method | None) -> KVStore | None:
    """Hand the emptied store of an earlier call over to the call that runs.

    Nobody else can take it from then on; `decode` parks it again.

    Returns:
        The store, if the same methods made it, else None.
    """
    step, patch.graphs.parked = patch.graphs.parked, None
    if step is None or step.store.eviction != eviction:
        return None
    step.store.restart()
    patch.running.step = step
    return step.store


def _step(
    model: PreTrainedModel, patch: Patch, store: KVStore, batch_size: int, limit: int
) -> StepGraph:
    """Return the step that this call has taken along with `store`, or a new one."""
    taken, patch.running.step = patch.running.step, None
    if taken is not None and taken.store is store:
        rows, width = taken.choice.ids.shape
        if rows == batch_size and width >= limit and taken.choice.ids.device == model.device:
            return taken
    # A power of two, so that prompts that keep growing need few new recordings.
    width = max(BUCKET, 1 << (limit - 1).bit_length())
    choice = TokenChoice(batch_size, width, RUN_AHEAD + 1, model.device, patch.backend)
    return StepGraph(model, store, choice, patch.graphs, patch.backend)


def _limit(criteria: StoppingCriteriaList, prompt_length: int) -> int | None:
    """Return how long a row gets at most; a first token is always generated."""
    limits = [c.max_length for c in criteria if type(c) is MaxLengthCriteria]
    return max(min(limits), prompt_length + 1) if limits else None


def _parking_bytes(store: KVStore) -> int:
    device = store.store_layers[0].device
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).total_memory * _PARKED_SHARE)


def _inputs_of_a_step(
    model: PreTrainedModel, store: KVStore, choice: TokenChoice, model_kwargs: dict[str, Any]
) -> dict[str, Any]:
    ids = choice.ids[:, : choice.length]
    inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **model_kwargs)
    # Every token from here on is real, and the store knows about the padding of the prompt.
    names = inputs.keys() - _PER_TOKEN | {"position_ids"}
    return {name: inputs[name] for name in sorted(names)} | {CACHE_KEYWORD: store}


def _obstacle(
    model: PreTrainedModel,
    patch: Patch,
    input_ids: Tensor,
    limit: int | None,
    config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> str | None:
    """Say what keeps a call from decoding by replays, or None."""
    store = model_kwargs.get(CACHE_KEYWORD)
    if not isinstance(store, KVStore):
        return f"the cache is a {type(store).__name__}" if store is not None else "use_cache=False"
    if any(not kind.storable for kind in patch.family.layers):
        return "some layers keep a state of their own"
    if any(layer.record_past for layer in store.store_layers) or config.is_assistant:
        return "the model drafts for another one"
    if config.output_attentions or config.output_hidden_states:
        return "hidden states of every step were asked for"
    if limit is None or limit > _MOST_COLUMNS:
        return f"the maximum length is {limit}, expected at most {_MOST_COLUMNS}"
    if input_ids.device != model.device:
        return f"the ids are on {input_ids.device}, the model is on {model.device}"
    if model_kwargs.get("position_ids") is None:
        return f"{type(model).__name__} takes no position_ids"
    extra = sorted(
        name
        for name, value in model_kwargs.items()
        if isinstance(value, Tensor) and name not in _PER_TOKEN | {"inputs_embeds"}
    )
    if extra:
        return f"the call brings {extra}"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast is on"
    if model.training:
        return "the model is in training mode"
    if model.device.type == "cuda" and patch.backend.choose(model.device) != "triton":
        return "the reference backend reads lengths on the host"
    return _module_obstacle(model, patch)


def _module_obstacle(model: PreTrainedModel, patch: Patch) -> str | None:
    if global_hooks():
        return "every module has forward hooks"
    devices: set[torch.device] = set()
    for module in model.modules():
        if trouble := _own_obstacle(module, patch):
            name = next(name for name, found in model.named_modules() if found is module)
            return trouble.format(name or "the model")
        devices.update(p.device for p in module._parameters.values() if p is not None)
    if len(devices) != 1:
        return f"the weights lie on {sorted(map(str, devices))}"
    return None


def _own_obstacle(module: nn.Module, patch: Patch) -> str | None:
    held = vars(module)
    if "_hf_hook" in held:
        return "accelerate moves the weights or inputs of {}"
    if module._compiled_call_impl is not None:
        return "{} is compiled"
    if "forward" in held and hasattr(held["forward"], "_torchdynamo_orig_callable"):
        return "{} is compiled"
    hooks = module._forward_hooks or module._forward_pre_hooks
    return "{} has forward hooks" if hooks and _foreign_hooks(module, patch) else None


def _foreign_hooks(module: nn.Module, patch: Patch) -> bool:
    # transformers leaves its recorders of hidden states behind; they sleep unless a call asks.
    if any(hook.__module__ != _RECORDERS for hook in module._forward_hooks.values()):
        return True
    return any(not patch.journal.holds_hook(hook) for hook in module._forward_pre_hooks.values())
