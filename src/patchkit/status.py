"""What is patched, with which backend, and what it did so far."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from patchkit.patch import Patch


@dataclass(frozen=True)
class MethodStatus:
    """One applied or skipped method.

    Attributes:
        name: Registry name.
        config: The configuration, as written.
        slots: Slots it fills.
        exact: Whether greedy tokens equal the unpatched model's.
        sites: Modules it acts on; empty if skipped.
        skipped: Why it does nothing, or None.
    """

    name: str
    config: str
    slots: tuple[str, ...]
    exact: bool
    sites: tuple[str, ...]
    skipped: str | None = None


@dataclass(frozen=True)
class PatchReport:
    """State of a model; `str()` is a table, `to_dict()` is for logs.

    Attributes:
        model: Class name of the model.
        model_type: `config.model_type`.
        patched: False for a plain model; the remaining fields are then empty.
        exact: True while no approximate method is applied.
        backend: Backend requested.
        methods: Applied methods in order, then the skipped ones.
        attention_layers: Attention modules served, of how many cache layers.
        fused: Norms, MLPs, rotary embeddings, routers and expert layers that kernels compute on a
            GPU, of how many.
        calls: Calls so far, as `{operation: {implementation: count}}`; implementations are `triton`
            (kernels), `reference` and `torch` (torch's own fused attention).
        steps: Decoding steps so far on a GPU: `recorded` as a CUDA graph, `replayed`, and run
            `eager`ly (kernel by kernel).
        unrecorded: Why no step is recorded any more, or None.
        host_loops: How many `generate()` calls on a GPU ran transformers' own loop, by reason.
        kv_bytes: Allocated bytes of the latest KV store, None if none is alive.
        kv_columns: Tokens that store has consumed, and the most it holds for any head.
        kv_stored: See `kv_columns`.
        kv_dense_bytes: What its tokens would take without eviction.
        kv_budgets: With an eviction method, the largest budget of any head by layer; None for a
            layer without one.
        kv_evicted: With an eviction method, tokens dropped by layer, over all rows and heads.
        displaced: Patched attributes that somebody has changed since; `restore` would refuse.
    """

    model: str
    model_type: str
    patched: bool
    exact: bool = True
    backend: str | None = None
    methods: tuple[MethodStatus, ...] = ()
    attention_layers: tuple[int, int] = (0, 0)
    fused: dict[str, tuple[int, int]] = field(default_factory=dict)
    calls: dict[str, dict[str, int]] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    unrecorded: str | None = None
    host_loops: dict[str, int] = field(default_factory=dict)
    kv_bytes: int | None = None
    kv_columns: int | None = None
    kv_stored: int | None = None
    kv_dense_bytes: int | None = None
    kv_budgets: tuple[int | None, ...] = ()
    kv_evicted: tuple[int | None, ...] = ()
    displaced: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and scalars."""
        return asdict(self)

    def __str__(self) -> str:
        if not self.patched:
            return f"{self.model} ({self.model_type}): not patched"
        served, layers = self.attention_layers
        rows = [
            ("model", f"{self.model} ({self.model_type})"),
            ("answers", "exact" if self.exact else "approximate"),
            ("attention", f"{served} of {layers} layers on the KV store"),
            ("fused", ", ".join(f"{n} of {all_} {what}" for what, (n, all_) in self.fused.items())),
            ("backend", f"requested {self.backend}, used {self._used()}"),
        ]
        for method in self.methods:
            where = method.skipped or f"{len(method.sites)} sites, {_kind(method.exact)}"
            state = "skipped" if method.skipped else "method"
            rows.append((state, f"{method.config} [{', '.join(method.slots)}]: {where}"))
        for operation, used in sorted(self.calls.items()):
            counts = ", ".join(f"{count} {name}" for name, count in sorted(used.items()))
            rows.append((operation, counts))
        if any(self.steps.values()):
            counts = ", ".join(f"{count} {name}" for name, count in self.steps.items())
            why = f" ({self.unrecorded})" if self.unrecorded else ""
            rows.append(("decoding", counts + why))
        for reason, count in self.host_loops.items():
            rows.append(("host loop", f"{count} calls: {reason}"))
        if self.kv_bytes is not None:
            rows.append(
                (
                    "KV store",
                    f"{self.kv_bytes:,} bytes; {self.kv_columns} tokens seen, "
                    f"at most {self.kv_stored} stored per head",
                )
            )
        if any(self.kv_evicted):
            dropped = sum(count or 0 for count in self.kv_evicted)
            rows.append(("evicted", f"{dropped:,} tokens over all layers, rows and heads"))
            rows.append(("instead of", f"{self.kv_dense_bytes:,} bytes of keys and values"))
            budgets = ["all" if b is None else str(b) for b in self.kv_budgets]
            by_layer = ", ".join(budgets) + " by layer" if len(set(budgets)) > 1 else budgets[0]
            rows.append(("budgets", f"tokens per head, at most: {by_layer}"))
        rows = [row for row in rows if row[1]]
        rows.append(("in place", "no: " + ", ".join(self.displaced) if self.displaced else "yes"))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def _used(self) -> str:
        names = sorted({name for used in self.calls.values() for name in used})
        return ", ".join(names) or "nothing yet"


def _kind(exact: bool) -> str:
    return "exact" if exact else "approximate"


def build_report(model: Any, patch: Patch | None) -> PatchReport:
    """Collect the report of an unwrapped model."""
    kind, model_type = type(model).__name__, model.config.model_type
    if patch is None:
        return PatchReport(kind, model_type, patched=False)
    statuses = [
        MethodStatus(m.name, repr(m), m.slots, m.exact, sites) for m, sites in patch.methods
    ]
    statuses += [
        MethodStatus(m.name, repr(m), m.slots, m.exact, (), reason) for m, reason in patch.skipped
    ]
    calls: dict[str, dict[str, int]] = {}
    for (operation, used), count in patch.backend.calls.items():
        calls.setdefault(operation, {})[used] = count
    layers = patch.family.layers
    store = patch.store
    return PatchReport(
        model=kind,
        model_type=model_type,
        patched=True,
        exact=all(method.exact for method, _ in patch.methods),
        backend=patch.backend.requested,
        methods=tuple(statuses),
        attention_layers=(sum(layer.storable for layer in layers), len(layers)),
        fused=dict(patch.fused),
        calls=calls,
        steps={
            "recorded": patch.graphs.captures,
            "replayed": patch.graphs.replays,
            "eager": patch.graphs.eager,
        },
        unrecorded=patch.graphs.refused,
        host_loops=dict(patch.host_loops),
        kv_bytes=None if store is None else store.nbytes,
        kv_columns=None if store is None else store.get_seq_length(),
        kv_stored=None
        if store is None
        else max((int(length.max()) for length in store.lengths()), default=0),
        kv_dense_bytes=None if store is None else store.dense_bytes,
        kv_budgets=_most(store.budgets()) if store and store.eviction else (),
        kv_evicted=_total(store.evicted()) if store and store.eviction else (),
        displaced=tuple(patch.journal.displaced()),
    )


def _most(tensors: list[Tensor | None]) -> tuple[int | None, ...]:
    return tuple(None if tensor is None else int(tensor.max()) for tensor in tensors)


def _total(tensors: list[Tensor | None]) -> tuple[int | None, ...]:
    return tuple(None if tensor is None else int(tensor.sum()) for tensor in tensors)
