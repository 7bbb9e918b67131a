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
import math
from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import GenerateDecoderOnlyOutput, GenerationConfig, GenerationMode
from transformers.generation.utils import GENERATION_MODES_MAPPING

from patchkit.attention.store import KVStore
from patchkit.attention.store_layer import BUCKET
from patchkit.compat import CACHE_KEYWORD
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
    config = GenerationConfig()
    own = getattr(given.get("generation_config"), "__dict__", {})
    for source in (model.generation_config.__dict__, own, given):
        for name, value in source.items():
            if value is not None and hasattr(config, name):
                setattr(config, name, value)
    mode = config.get_generation_mode(given.get("assistant_model"))
    return mode in _MODES and not config.token_healing and not given.get("synced_gpus")


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
    """
    patch: Patch = model.__dict__["_patchkit"]
    streamer = patch.running.streamer
    obstacle = _obstacle(model, patch, stopping_criteria, generation_config, model_kwargs)
    if obstacle is not None:
        if obstacle not in patch.host_loops:
            logger.warning("patchkit decodes through transformers' own loop: %s", obstacle)
        patch.host_loops[obstacle] += 1
        mode = generation_config.get_generation_mode()
        loop = getattr(type(model), GENERATION_MODES_MAPPING[mode])
        lists = (logits_processor, stopping_criteria)
        return loop(model, input_ids, *lists, generation_config, streamer=streamer, **model_kwargs)
    store: KVStore = model_kwargs[CACHE_KEYWORD]
    limit = stopping_criteria.max_length
    step = _step(model, patch, store, input_ids.shape[0], limit)
    choice = step.choice
    choice.begin(input_ids, logits_processor, stopping_criteria, generation_config)
    prompt_length, remaining = choice.length, limit - choice.length
    returned = generation_config.return_dict_in_generate
    history = _History(choice, generation_config)
    outbox = _Outbox(choice, streamer)
    # What an evicting store has dropped does not come back, so its last step must be the last.
    evicts = any(layer.policy is not None for layer in store.store_layers)
    kept = returned or getattr(store, "_is_user_defined", False)
    run_ahead = 0 if kept and evicts else RUN_AHEAD

    with store.expecting(min(remaining, RESERVE)):
        outputs = model._prefill(input_ids, generation_config, model_kwargs)
    model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
    logits = outputs.logits[:, -1].to(torch.float32, copy=True)
    del outputs
    choice.choose(logits)
    history.add(logits)
    choice.advance()
    outbox.push()
    remaining -= 1

    if remaining and not outbox.finished(run_ahead):
        inputs = _inputs_of_a_step(model, store, choice, model_kwargs)
        step.begin(inputs, inputs.pop("position_ids"))
        with model._optimize_model_for_decode():
            while remaining:
                step.run(remaining)
                history.add(step.logits)
                choice.advance()
                outbox.push()
                remaining -= 1
                if outbox.finished(run_ahead):
                    break
    new_tokens = outbox.close()
    if kept:
        store.crop(new_tokens - (choice.length - prompt_length))
    sequences = choice.sequences(prompt_length + new_tokens)
    if not kept and store.nbytes <= _parking_bytes(store):
        patch.graphs.parked = step
    if not returned:
        return sequences
    return GenerateDecoderOnlyOutput(
        sequences=sequences, **history.cut(new_tokens), **{CACHE_KEYWORD: store}
    )


def take_parked(patch: Patch, eviction: Method | None) -> KVStore | None:
    """Return the emptied store of the latest call, if the same methods made it, else None."""
    step = patch.graphs.parked
    if step is None or step.store.eviction != eviction:
        patch.graphs.parked = None
        return None
    step.store.restart()
    return step.store


def _step(
    model: PreTrainedModel, patch: Patch, store: KVStore, batch_size: int, limit: int
) -> StepGraph:
    """Return the parked step that belongs to `store`, or a new one; nothing stays parked."""
    parked, patch.graphs.parked = patch.graphs.parked, None
    if parked is not None and parked.store is store:
        rows, width = parked.choice.ids.shape
        if rows == batch_size and width >= limit:
            return parked
    choice = TokenChoice(batch_size, math.ceil(limit / BUCKET) * BUCKET, model.device)
    return StepGraph(model, store, choice, patch.graphs)


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
    criteria: StoppingCriteriaList,
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
    if criteria.max_length is None:
        return "there is no maximum length"
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
    devices: set[torch.device] = set()
    for name, module in model.named_modules():
        if "_hf_hook" in vars(module):
            return f"accelerate moves the weights or inputs of {name or 'the model'}"
        if module._compiled_call_impl is not None:
            return f"{name or 'the model'} is compiled"
        if _foreign_hooks(module, patch):
            return f"{name or 'the model'} has forward hooks"
        devices.update(p.device for p in module._parameters.values() if p is not None)
    if len(devices) != 1:
        return f"the weights lie on {sorted(map(str, devices))}"
    return None


def _foreign_hooks(module: nn.Module, patch: Patch) -> bool:
    if module._forward_hooks:
        return True
    return any(not patch.journal.holds_hook(hook) for hook in module._forward_pre_hooks.values())


class _History:
    """The logits and scores of every step, where the caller wants them returned."""

    def __init__(self, choice: TokenChoice, config: GenerationConfig) -> None:
        returned = config.return_dict_in_generate
        choice.history = () if returned and config.output_scores else None
        self._logits: tuple[Tensor, ...] | None = () if returned and config.output_logits else None
        self._choice = choice

    def add(self, logits: Tensor) -> None:
        """Keep copies of what the newest token was chosen from."""
        if self._choice.history is not None:
            self._choice.history += (self._choice.scores.clone(),)
        if self._logits is not None:
            self._logits += (logits.clone(),)

    def cut(self, steps: int) -> dict[str, tuple[Tensor, ...] | None]:
        """Return the first `steps` entries under the names of transformers' output."""
        held = {"scores": self._choice.history, "logits": self._logits}
        return {name: None if kept is None else kept[:steps] for name, kept in held.items()}


class _Outbox:
    """Brings tokens and the end of all rows to the host in order, some steps late.

    Copies to pinned memory are queued behind every step and looked at `run_ahead` steps later, so
    that the device never runs dry. A token is streamed once it is known to belong to the answer.

    Args:
        choice: Where the tokens are.
        streamer: The streamer of the call, or None.
    """

    def __init__(self, choice: TokenChoice, streamer: Any) -> None:
        self._choice, self._streamer = choice, streamer
        self._waiting: deque[tuple[Tensor, Tensor | None, torch.cuda.Event | None]] = deque()
        self._free: list[tuple[Tensor, Tensor | None, torch.cuda.Event | None]] = []
        self._known = 0  # steps known to belong to the answer
        self._done = False

    def _slot(self) -> tuple[Tensor, Tensor | None, torch.cuda.Event | None]:
        if self._free:
            return self._free.pop()
        cuda = self._choice.alive.is_cuda
        alive = torch.empty(1, dtype=torch.bool, pin_memory=cuda)
        tokens = None
        if self._streamer is not None:
            tokens = torch.empty(self._choice.token.shape[0], dtype=torch.long, pin_memory=cuda)
        return alive, tokens, torch.cuda.Event() if cuda else None

    def push(self) -> None:
        """Queue the copies of the step that was queued last."""
        alive, tokens, event = slot = self._slot()
        if self._choice.watches:
            alive.copy_(self._choice.alive, non_blocking=True)
        else:
            alive.fill_(True)
        if tokens is not None:
            tokens.copy_(self._choice.token[:, 0], non_blocking=True)
        if event is not None:
            event.record()
        self._waiting.append(slot)

    def finished(self, run_ahead: int) -> bool:
        """Deliver all but the newest `run_ahead` steps; say whether one finished every row."""
        while len(self._waiting) > run_ahead and not self._done:
            alive, tokens, event = slot = self._waiting.popleft()
            if event is not None and (self._choice.watches or tokens is not None):
                event.synchronize()
            self._known += 1
            if tokens is not None:
                self._streamer.put(tokens.clone())
            self._done = not alive.item()
            self._free.append(slot)
        return self._done

    def close(self) -> int:
        """Deliver the rest, end the stream, and return how many tokens the answer has."""
        self.finished(0)
        if self._streamer is not None:
            self._streamer.end()
        return self._known
