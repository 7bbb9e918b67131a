"""Draw `quality.png`: measures of `bench_quality.py` by budget, from the rows of `results.csv`.

    python examples/benchmarks/plot_quality.py      # needs the extra "bench"

One row of axes per context length, one line per method, dense as a black line. The newest figure of
every case and method counts; bars are 95 % intervals over contexts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from harness import RESULTS

FOLDER = Path(__file__).parent
MEASURES = {
    "recall NLL": "passage recall, nats per token",
    "needle hits": "needles found, share",
    "text NLL over dense": "loss on further text, nats over dense",
    "KL": "KL(dense || method), nats",
}
COLOURS = {
    "Window": "#9aa5b1",
    "SnapKV": "#1769aa",
    "PyramidKV": "#6fb1e0",
    "AdaKV": "#1fa3a3",
    "TOVA": "#3a8f5c",
    "H2O": "#d9822b",
    "CAKE": "#a23b72",
}


def figures(gpu: str, case: str) -> pd.DataFrame:
    """Return p20, p50 and p80 by length, metric, method and budget."""
    rows = pd.read_csv(RESULTS)
    rows = rows[(rows.bench == "quality") & rows.gpu.str.contains(gpu, regex=False)]
    rows = rows[rows.config.str.endswith(case)]
    if rows.empty:
        raise SystemExit(f"{RESULTS} has no rows of bench 'quality' for {gpu!r} and {case!r}")
    parts = rows.config.str.extract(r"S(?P<length>\d+) b(?P<budget>\d+)").astype(int)
    keys = ["length", "metric", "provider", "budget"]
    return rows.join(parts).groupby(keys)[["p20", "p50", "p80"]].last()


def draw(axes: plt.Axes, table: pd.DataFrame) -> None:
    """Draw one measure at one length: `table` has the methods and budgets."""
    for method, colour in COLOURS.items():
        if method not in table.index.get_level_values("provider"):
            continue
        rows = table.loc[method]
        errors = [rows.p50 - rows.p20, rows.p80 - rows.p50]
        axes.errorbar(rows.index, rows.p50, errors, color=colour, marker="o", ms=4, label=method)
    dense = table.loc["dense"].p50.iloc[-1]
    axes.axhline(dense, color="black", linewidth=1, label="dense")
    budgets = sorted(table.drop("dense").index.get_level_values("budget").unique())
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, [str(budget) for budget in budgets])
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", default="H100")
    parser.add_argument("--case", default="N16 +256/32 bfloat16", help="how the config ends")
    args = parser.parse_args()
    table = figures(args.gpu, args.case)
    print(table.p50.unstack().round(3).to_string())
    lengths = table.index.get_level_values("length").unique()
    size = (3.4 * len(MEASURES), 0.6 + 2.7 * len(lengths))
    figure, grid = plt.subplots(
        len(lengths), len(MEASURES), figsize=size, squeeze=False, sharex=True, sharey="col"
    )
    for row, length in zip(grid, lengths, strict=True):
        for axes, measure in zip(row, MEASURES, strict=True):
            draw(axes, table.loc[length, measure])
        row[0].set_ylabel(f"{length:,} tokens of context")
    for axes, title in zip(grid[0], MEASURES.values(), strict=True):
        axes.set_title(title, fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("budget, tokens per layer and KV head")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.tight_layout(rect=(0, 0, 1, 0.93 if len(lengths) > 1 else 0.9))
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False)
    figure.savefig(FOLDER / "quality.png", dpi=120)


if __name__ == "__main__":
    main()
