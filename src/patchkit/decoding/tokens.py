"""Turn words into token ids, strictly: a string counts only if it names exactly one token.

`convert_tokens_to_ids` is not used on purpose. For a string that is no token it answers None, or
the id of the unknown token, which on some tokenizers is the end-of-text token; a bias put there
changes when generation stops.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from patchkit.errors import TokenResolutionError

PAPER_STRINGS = ("wait", "Wait", "but", "But", "Alternatively")
"""The five strings of the CyclicReflex authors, all without a leading space."""

END_THINK = "</think>"

ReflectionSpec = str | Sequence[str | int]
SequenceSpec = str | int | Sequence[int]

_PRESETS = ("paper", "expanded")


def check_reflection_spec(spec: ReflectionSpec) -> ReflectionSpec:
    """Return `spec` hashable; raise ValueError unless it is a preset or lists strings and ids."""
    if isinstance(spec, str):
        if spec not in _PRESETS:
            raise ValueError(
                f"reflection_tokens must be one of {_PRESETS} or a list of strings and ids, "
                f"got {spec!r}"
            )
        return spec
    items = tuple(spec)
    if not items or not all(isinstance(x, str) or _is_id(x) for x in items):
        raise ValueError(f"reflection_tokens must list strings and token ids, got {spec!r}")
    return items


def check_sequence_spec(field: str, spec: SequenceSpec) -> SequenceSpec:
    """Return `spec` hashable; raise ValueError unless it is a text, an id or a list of ids."""
    if isinstance(spec, str) and spec:
        return spec
    items: tuple[Any, ...] = (spec,) if isinstance(spec, int) else tuple(spec)
    if not items or not all(_is_id(x) for x in items):
        raise ValueError(f"{field} must be a text, a token id or a list of ids, got {spec!r}")
    return items


def resolve_reflection_tokens(
    spec: ReflectionSpec, tokenizer: Any, vocab_size: int | None = None
) -> tuple[int, ...]:
    """Look up the ids of the reflection tokens.

    Args:
        spec: `"paper"` (`PAPER_STRINGS`), `"expanded"` (the same words, lower-case and
            capitalised, without and with a leading space), or strings and ids.
        tokenizer: May be None if `spec` holds only ids.
        vocab_size: Ids must be below it, if known.

    Returns:
        Unique ids in the order of `spec`.

    Raises:
        TokenResolutionError: a string listed by the user is not one token, an id is out of range,
            nothing is left, or strings came without a tokenizer.
    """
    spec = check_reflection_spec(spec)
    if isinstance(spec, str):
        ids = _preset(spec, tokenizer)
    else:
        ids = [_listed(x, tokenizer) if isinstance(x, str) else x for x in spec]
    if not ids:
        raise TokenResolutionError(
            f"reflection_tokens={spec!r} names no token of this vocabulary; "
            "list strings or ids that do"
        )
    return _checked(dict.fromkeys(ids), vocab_size)


def resolve_end_think(
    spec: SequenceSpec | None, tokenizer: Any, vocab_size: int | None = None
) -> tuple[int, ...] | None:
    """Look up the id sequence that ends the thinking part, or None if nothing does.

    Args:
        spec: None; `"auto"` (`"</think>"` if that is one token of the vocabulary, else None);
            another string, which may take several ids; an id; or the ids themselves.
        tokenizer: May be None if `spec` holds no string; `"auto"` is then None.
        vocab_size: Ids must be below it, if known.

    Raises:
        TokenResolutionError: a string other than `"auto"` does not survive encoding and decoding,
            or an id is out of range.
    """
    if spec is None:
        return None
    if spec == "auto":
        found = None if tokenizer is None else single_id(END_THINK, tokenizer)
        return None if found is None else _checked([found], vocab_size)
    return resolve_sequence("end_think", spec, tokenizer, vocab_size)


def require_end_think(
    spec: SequenceSpec, tokenizer: Any, vocab_size: int | None = None
) -> tuple[int, ...]:
    """Look up the end-of-thinking sequence like `resolve_end_think`, for methods that need one.

    Raises:
        TokenResolutionError: also if `"auto"` finds nothing.
    """
    found = resolve_end_think(spec, tokenizer, vocab_size)
    if found is None:
        where = "there is no tokenizer" if tokenizer is None else "it is not one token here"
        raise TokenResolutionError(
            f"end_think={spec!r} stands for {END_THINK!r}, but {where}: give the text or the ids "
            "that end thinking, or a tokenizer"
        )
    return found


def resolve_sequence(
    field: str, spec: SequenceSpec, tokenizer: Any, vocab_size: int | None = None
) -> tuple[int, ...]:
    """Look up the ids of a text, or check ids that were given; `field` names it in errors.

    Raises:
        TokenResolutionError: as in `resolve_end_think`.
    """
    spec = check_sequence_spec(field, spec)
    if not isinstance(spec, str):
        return _checked([spec] if isinstance(spec, int) else spec, vocab_size)
    ids = _encode(spec, _required(tokenizer, spec))
    if not ids or not _round_trip(spec, ids, tokenizer):
        raise TokenResolutionError(
            f"{field}={spec!r} cannot be written in this vocabulary: it encodes to {ids}, "
            f"which reads {_decode(ids, tokenizer)!r}"
        )
    return _checked(ids, vocab_size)


def single_id(string: str, tokenizer: Any) -> int | None:
    """Return the id of the one token that encodes to and decodes from `string`, or None."""
    ids = _encode(string, tokenizer)
    return ids[0] if len(ids) == 1 and _round_trip(string, ids, tokenizer) else None


def find_tokenizer(own: Any, given: Any, model: PreTrainedModel, *, required: bool) -> Any:
    """Return the method's own tokenizer, else that of the call, else the one beside the weights.

    Args:
        own: The method's `tokenizer` field, or None.
        given: The tokenizer passed to `generate(tokenizer=...)`, or None.
        model: Its `name_or_path` is looked up in local files only, once per path.
        required: Raise instead of returning None where nothing is found.

    Raises:
        TokenResolutionError: nothing was found and `required`.
    """
    if own is not None or given is not None:
        return own if own is not None else given
    try:
        return _load_tokenizer(getattr(model, "name_or_path", ""))
    except (OSError, ValueError, ImportError, KeyError) as error:
        if not required:
            return None
        raise TokenResolutionError(
            f"token strings need a tokenizer, and none could be loaded from "
            f"{getattr(model, 'name_or_path', '')!r}: pass tokenizer=... to the method, "
            "or give integer ids"
        ) from error


@lru_cache(maxsize=8)
def _load_tokenizer(path: str) -> Any:
    if not path:
        raise OSError("the model was not loaded from anywhere")
    return AutoTokenizer.from_pretrained(path, local_files_only=True)


def _preset(name: str, tokenizer: Any) -> list[int]:
    strings = PAPER_STRINGS if name == "paper" else PAPER_STRINGS + _variants()
    found = {s: single_id(s, _required(tokenizer, name)) for s in strings}
    dropped = [s for s in PAPER_STRINGS if found[s] is None]
    if dropped:
        warnings.warn(
            f"reflection_tokens={name!r}: {dropped} are not single tokens here and are left out",
            UserWarning,
            stacklevel=2,
        )
    return [i for i in found.values() if i is not None]


def _variants() -> tuple[str, ...]:
    cased = [form for s in PAPER_STRINGS for form in (s.lower(), s.capitalize())]
    return tuple(dict.fromkeys(space + form for form in cased for space in ("", " ")))


def _listed(string: str, tokenizer: Any) -> int:
    found = single_id(string, _required(tokenizer, string))
    if found is None:
        ids = _encode(string, tokenizer)
        raise TokenResolutionError(
            f"expected strings that are exactly one token, got {string!r}, which encodes to {ids} "
            f"({_decode(ids, tokenizer)!r})"
        )
    return found


def _required(tokenizer: Any, what: str) -> Any:
    if tokenizer is None:
        raise TokenResolutionError(
            f"{what!r} needs a tokenizer: pass tokenizer=..., or give integer ids"
        )
    return tokenizer


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _checked(ids: Iterable[int], vocab_size: int | None) -> tuple[int, ...]:
    ids = tuple(ids)
    limit = math.inf if vocab_size is None else vocab_size
    wrong = [i for i in ids if not 0 <= i < limit]
    if wrong:
        raise TokenResolutionError(f"expected token ids in [0, {limit}), got {wrong}")
    return ids


def _encode(string: str, tokenizer: Any) -> list[int]:
    return list(tokenizer.encode(string, add_special_tokens=False))


def _decode(ids: Sequence[int], tokenizer: Any) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _round_trip(string: str, ids: Sequence[int], tokenizer: Any) -> bool:
    return _decode(ids, tokenizer) == string
