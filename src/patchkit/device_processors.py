"""Logits processors whose every changing input lies on the device, so that a CUDA graph holds them.

transformers' processors read how long `input_ids` is on the host, and some read the ids themselves
there. A `DeviceProcessor` gets the whole id buffer and the number of its valid columns as a tensor.
It works with fixed shapes, waits for nothing, and gives the scores of the processor that it stands
for, bit for bit, or, where a kernel truncates, the same tokens as far as rounding lets it.
`on_device` translates the processors of transformers that are known here, and any processor that
brings a translation of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from patchkit.backends import Backend


class TopKThenTopP(LogitsProcessor):
    """Top-k and top-p in one, so that one kernel serves both.

    Args:
        top_k: As of `TopKLogitsWarper`.
        top_p: As of `TopPLogitsWarper`.
    """

    filter_value, min_tokens_to_keep = -math.inf, 1

    def __init__(self, top_k: int, top_p: float) -> None:
        self.top_k, self.top_p = top_k, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores `[B, V]` of which the others are removed."""
        scores = TopKLogitsWarper(self.top_k)(input_ids, scores)
        return TopPLogitsWarper(self.top_p)(input_ids, scores)


_FUNCTIONS_OF_SCORES = (
    EpsilonLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopKThenTopP,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
"""Processors that look at the scores alone and never wait for the device: they run as they are,
unless there is a kernel."""

_KERNELS: dict[type, Callable[[Any], tuple[str, dict[str, Any]]]] = {
    TopKLogitsWarper: lambda own: ("keep_top", {"count": own.top_k}),
    TopPLogitsWarper: lambda own: ("keep_top", {"mass": own.top_p}),
    TopKThenTopP: lambda own: ("keep_top", {"count": own.top_k, "mass": own.top_p}),
    MinPLogitsWarper: lambda own: ("keep_likely", {"ratio": own.min_p}),
}
"""Operations that do what a processor of scores does that keeps at least one token, or, for top-k,
any number."""

_ALWAYS = (0, torch.iinfo(torch.int64).max)


@dataclass(frozen=True, eq=False)
class DeviceProcessor:
    """A function `(ids, count, scores, **constants) -> scores` of tensors at fixed addresses.

    Its arguments are `ids [B, W]` int64; `count [1]` int64 in `[0, W)`, the number of leading
    columns of `ids` that are valid (the others may hold anything); and `scores [B, V]`, which it
    leaves as they are.

    Attributes:
        function: The function.
        settings: All that a recording of it freezes, besides the addresses of `constants`.
        constants: Tensors that it reads anew at every step, or keeps its state in.
    """

    function: Callable[..., Tensor]
    settings: Hashable
    constants: dict[str, Tensor]

    @classmethod
    def of(
        cls,
        function: Callable[..., Tensor],
        device: torch.device,
        constants: dict[str, Any],
        **settings: Hashable,
    ) -> DeviceProcessor:
        """Bind a module-level function to its settings and to copies of its constants.

        Args:
            function: Takes `constants` and `settings` as keywords.
            device: Of the scores.
            constants: Tensors, or numbers in nested sequences. Those that are None are left out.
            settings: Plain values.
        """
        given = {name: value for name, value in constants.items() if value is not None}
        held = {name: torch.as_tensor(v).to(device, copy=True) for name, v in given.items()}
        return cls(partial(function, **settings), (function, *sorted(settings.items())), held)

    def __call__(self, ids: Tensor, count: Tensor, scores: Tensor) -> Tensor:
        """Return processed scores `[B, V]`."""
        return self.function(ids, count, scores, **self.constants)

    @property
    def recipe(self) -> Hashable:
        """What a recording has frozen: settings, shapes and addresses."""
        return self._layout, tuple(tensor.data_ptr() for tensor in self.constants.values())

    def renewed(self, held: object) -> DeviceProcessor:
        """Return `held` with these constants if it differs in nothing else, otherwise this one.

        The constants are written into those of `held`, whose addresses a recording may know. A
        function of scores alone has none; the processor it was made from serves later calls too.
        """
        if not isinstance(held, DeviceProcessor) or held._layout != self._layout:
            return self
        for name, constant in self.constants.items():
            held.constants[name].copy_(constant)
        return held

    @property
    def _layout(self) -> Hashable:
        shapes = tuple((name, t.shape, t.dtype, t.device) for name, t in self.constants.items())
        return self.settings, shapes


def merged(processors: Iterable[LogitsProcessor]) -> list[LogitsProcessor]:
    """Put every top-k and the top-p that follows it into one processor, if both only remove."""
    result: list[Any] = []
    for new in processors:
        held: Any = result[-1] if result else None
        if (
            (type(held), type(new)) == (TopKLogitsWarper, TopPLogitsWarper)
            and held.filter_value == new.filter_value == -math.inf
            and new.min_tokens_to_keep == 1
        ):
            result[-1] = TopKThenTopP(held.top_k, new.top_p)
        else:
            result.append(new)
    return result


def on_device(
    processor: LogitsProcessor, ids: Tensor, prompt_length: int, backend: Backend
) -> DeviceProcessor | None:
    """Translate a processor of one `generate()` call; None if only the host can run it.

    A processor takes part by a method `on_device(ids, prompt_length) -> DeviceProcessor`. It has to
    be defined in the very class of the processor, as a subclass may process otherwise.

    Args:
        processor: Of exactly one of the types known here, or with a translation of its own.
        ids: `[B, W]` int64, the buffer that it will read.
        prompt_length: Columns of `ids` that the prompt takes.
        backend: Runs the kernels.
    """
    kind = type(processor)
    if "on_device" in vars(kind):
        return processor.on_device(ids, prompt_length)
    if kind in _FUNCTIONS_OF_SCORES and all(isinstance(v, Real) for v in vars(processor).values()):
        settings = (kind, *sorted(vars(processor).items()))
        return DeviceProcessor(_function_of_scores(processor, backend), settings, {})
    translate = _TRANSLATIONS.get(kind)
    return None if translate is None else translate(processor, ids)


def _function_of_scores(own: Any, backend: Backend) -> Callable[..., Tensor]:
    """Return what a processor of scores alone does, by a kernel if there is one."""
    kind = type(own)
    if kind not in _KERNELS or (kind is not TopKLogitsWarper and own.min_tokens_to_keep > 1):
        return lambda ids, _, scores: own(ids, scores)
    op, kept = _KERNELS[kind](own)

    def keep(ids: Tensor, _: Tensor, scores: Tensor) -> Tensor:
        if scores.dtype != torch.float32:  # of a custom processor
            return own(ids, scores)
        return backend.run("decoding", op, scores.device, scores, **kept, fill=own.filter_value)

    return keep


# -- reading the prefix ------------------------------------------------------------------------


def columns(ids: Tensor) -> Tensor:
    """Number the columns of `ids [B, W]` -> int64 `[W]`."""
    return torch.arange(ids.shape[1], device=ids.device)


def newest(ids: Tensor, count: Tensor, num_tokens: int, start: Tensor | int = 0) -> Tensor:
    """Return the newest tokens of every row, oldest first.

    Args:
        ids: `[B, W]` int64.
        count: `[1]` int64, the valid columns.
        num_tokens: How many tokens.
        start: `[1]` int64, the column of the first token that is looked at.

    Returns:
        `[B, num_tokens]` int64, -1 where there are fewer.
    """
    places = count + torch.arange(-num_tokens, 0, device=ids.device)
    return ids.index_select(1, places.clamp(min=0)).masked_fill(places < start, -1)


def occurrences(ids: Tensor, count: Tensor, sequence: Tensor, start: Tensor | int = 0) -> Tensor:
    """Mark the columns at which a sequence starts.

    Args:
        ids: `[B, W]` int64.
        count: `[1]` int64, the valid columns; a sequence lies inside them.
        sequence: `[m]` or `[B, m]` int64.
        start: `[1]` int64, the first column that is looked at.

    Returns:
        `[B, max(W - m + 1, 0)]` bool.
    """
    length = sequence.shape[-1]
    if length > ids.shape[1]:
        return ids.new_zeros((ids.shape[0], 0), dtype=torch.bool)
    found = (ids.unfold(1, length, 1) == sequence.unsqueeze(-2)).all(-1)
    first = torch.arange(found.shape[1], device=ids.device)
    return found & (first >= start) & (first + length <= count)


def marked(ids: Tensor, size: int, valid: Tensor | None = None) -> Tensor:
    """Mark which of the numbers below `size` occur.

    Args:
        ids: `[..., n]` int64; what lies outside `[0, size)` marks nothing.
        size: Most often V.
        valid: `[..., n]` bool, the ids that count; None for all.

    Returns:
        `[..., size]` bool.
    """
    known = (ids >= 0) & (ids < size)
    known = known if valid is None else known & valid
    flags = ids.new_zeros((*ids.shape[:-1], size + 1), dtype=torch.bool)
    return flags.scatter_(-1, torch.where(known, ids, size), True)[..., :size]


# -- the processors of transformers ------------------------------------------------------------


def _forbid(
    ids: Tensor, count: Tensor, scores: Tensor, *, tokens: Tensor, lengths: Tensor
) -> Tensor:
    """Forbid `tokens [n]` while the prefix is as long as the half-open range `lengths [2]` says."""
    due = (count >= lengths[0]) & (count < lengths[1])
    return scores.masked_fill(marked(tokens, scores.shape[1]) & due, -math.inf)


def _force(ids: Tensor, count: Tensor, scores: Tensor, *, tokens: Tensor, length: Tensor) -> Tensor:
    """Leave nothing but `tokens [n]` once the prefix is of `length [1]`."""
    forced = torch.zeros_like(scores).masked_fill(~marked(tokens, scores.shape[1]), -math.inf)
    return torch.where(count == length, forced, scores)


def _penalise(
    ids: Tensor, count: Tensor, scores: Tensor, *, skipped: Tensor, penalty: float
) -> Tensor:
    """Penalise what occurs from column `skipped` (`[1]` or `[B]`) on."""
    place = columns(ids)
    seen = marked(ids, scores.shape[1], (place >= skipped[:, None]) & (place < count))
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def _forbid_repeats(ids: Tensor, count: Tensor, scores: Tensor, *, size: int) -> Tensor:
    """Forbid what would complete an n-gram of `size` tokens that occurred before."""
    begun = occurrences(ids, count - 1, newest(ids, count, size - 1))[:, :-1]
    return scores.masked_fill(marked(ids[:, size - 1 :], scores.shape[1], begun), -math.inf)


def _bias_sequences(
    ids: Tensor,
    count: Tensor,
    scores: Tensor,
    *,
    prefixes: Tensor,
    least: Tensor,
    last: Tensor,
    biases: Tensor,
    largest: int,
    own: LogitsProcessor,
) -> Tensor:
    """Bias the tokens that would complete a sequence.

    Args:
        prefixes: `[S, L]` int64, all tokens of a sequence but the last, oldest first, after as many
            -1 as there is room for.
        least: `[S]` int64, how long the prefix has to be.
        last: `[S]` int64, the last tokens, in the order in which biases of one token add up.
        biases: `[S]` float32.
        largest: Of the tokens.
        own: The processor of transformers, which refuses tokens that do not exist.
    """
    if largest >= scores.shape[1]:
        own(ids[:, :1], scores)
    tail = newest(ids, count, prefixes.shape[1])[:, None]
    found = ((tail == prefixes) | (prefixes < 0)).all(-1) & (count >= least)
    added = torch.where(found, biases, 0.0).to(scores.dtype)
    return scores + torch.zeros_like(scores).index_add_(1, last, added)


def _cut_eta(
    ids: Tensor, count: Tensor, scores: Tensor, *, epsilon: Tensor, kept: int, fill: float
) -> Tensor:
    """Cut what is less probable than the entropy allows: eta sampling, arXiv 2210.15191."""
    entropy = Categorical(logits=scores, validate_args=False).entropy()
    eta = torch.min(epsilon, epsilon.sqrt() * torch.exp(-entropy))[:, None]
    least = scores.topk(min(kept, scores.shape[1])).values[:, -1:]
    return scores.masked_fill((scores.softmax(-1) < eta) & (scores < least), fill)


def _cut_entropy(
    ids: Tensor, count: Tensor, scores: Tensor, *, share: float, most: int, fill: float
) -> Tensor:
    """Keep the head that holds a share of the entropy: Top-H sampling, arXiv 2509.02510."""
    head, tokens = scores.topk(min(most, scores.shape[1]))
    head = Categorical(logits=head, validate_args=False)
    terms = -head.probs * torch.log(head.probs)
    beyond = ~(terms.cumsum(-1) <= (head.entropy() * share)[:, None])
    beyond[:, 0] = False
    return scores.masked_fill(
        torch.ones_like(scores, dtype=torch.bool).scatter(1, tokens, beyond), fill
    )


def _vector(value: Any) -> Tensor:
    return torch.as_tensor(value).flatten().long()


def _forbidding(tokens: Any, first: int, end: int, ids: Tensor) -> DeviceProcessor:
    constants = {"tokens": _vector(tokens), "lengths": [first, end]}
    return DeviceProcessor.of(_forbid, ids.device, constants)


def _forcing(tokens: Any, length: int, ids: Tensor) -> DeviceProcessor:
    constants = {"tokens": _vector(tokens), "length": [length]}
    return DeviceProcessor.of(_force, ids.device, constants)


def _penalising(own: Any, ids: Tensor) -> DeviceProcessor | None:
    skipped = _vector(0 if own.prompt_ignore_length is None else own.prompt_ignore_length)
    if len(skipped) not in (1, ids.shape[0]):
        return None  # refused by transformers
    return DeviceProcessor.of(_penalise, ids.device, {"skipped": skipped}, penalty=own.penalty)


def _biasing(own: Any, ids: Tensor) -> DeviceProcessor | None:
    if () in own.sequence_bias:
        return None  # versions differ in what they make of it
    # The order of transformers: single tokens first, and then, in newer versions, by length.
    grouped = hasattr(own, "multi_token_biases")
    lengths = list(dict.fromkeys([1, *map(len, own.sequence_bias)]))
    sequences = sorted(
        own.sequence_bias, key=lambda s: lengths.index(len(s)) if grouped else len(s) > 1
    )
    longest = max(map(len, sequences), default=1)
    constants = {
        "prefixes": [[-1] * (longest - len(s)) + list(s[:-1]) for s in sequences],
        # Older versions ignore a prefix that takes all there is.
        "least": [len(s) - 1 if grouped or len(s) == 1 else len(s) for s in sequences],
        "last": [s[-1] for s in sequences],
    }
    held = {name: torch.tensor(value).long() for name, value in constants.items()}
    held["prefixes"] = held["prefixes"].view(len(sequences), longest - 1)
    held["biases"] = torch.tensor([own.sequence_bias[s] for s in sequences], dtype=torch.float32)
    largest = max((int(max(s)) for s in sequences), default=0)
    twin = DeviceProcessor.of(_bias_sequences, ids.device, held, largest=largest)
    return DeviceProcessor(partial(twin.function, own=own), twin.settings, twin.constants)


_TRANSLATIONS: dict[type, Callable[[Any, Tensor], DeviceProcessor | None]] = {
    EtaLogitsWarper: lambda own, ids: DeviceProcessor.of(
        _cut_eta,
        ids.device,
        {"epsilon": own.epsilon},
        kept=own.min_tokens_to_keep,
        fill=own.filter_value,
    ),
    ForcedBOSTokenLogitsProcessor: lambda own, ids: _forcing(own.bos_token_id, 1, ids),
    ForcedEOSTokenLogitsProcessor: lambda own, ids: _forcing(
        own.eos_token_id, own.max_length - 1, ids
    ),
    MinLengthLogitsProcessor: lambda own, ids: _forbidding(
        own.eos_token_id, 0, own.min_length, ids
    ),
    MinNewTokensLengthLogitsProcessor: lambda own, ids: _forbidding(
        own.eos_token_id, 0, own.prompt_length_to_skip + own.min_new_tokens, ids
    ),
    NoBadWordsLogitsProcessor: _biasing,
    NoRepeatNGramLogitsProcessor: lambda own, ids: DeviceProcessor.of(
        _forbid_repeats, ids.device, {}, size=own.ngram_size
    ),
    RepetitionPenaltyLogitsProcessor: _penalising,
    SequenceBiasLogitsProcessor: _biasing,
    SuppressTokensAtBeginLogitsProcessor: lambda own, ids: _forbidding(
        own.begin_suppress_tokens, own.begin_index, own.begin_index + 1, ids
    ),
    SuppressTokensLogitsProcessor: lambda own, ids: _forbidding(own.suppress_tokens, *_ALWAYS, ids),
    TopHLogitsWarper: lambda own, ids: DeviceProcessor.of(
        _cut_entropy, ids.device, {}, share=own.top_h, most=own.top_n, fill=own.filter_value
    ),
}
"""How the processors of transformers are translated, by their exact type."""
