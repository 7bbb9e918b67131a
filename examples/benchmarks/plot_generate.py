"""Draw `generate.png`: time per token of whole `generate()` calls, from the rows of `results.csv`.

    python examples/benchmarks/plot_generate.py     # needs the extra "bench"

The newest figure of every case and provider counts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

FOLDER = Path(__file__).parent
PROVIDERS = {"transformers": "#9aa5b1", "static + compile": "#d9822b", "patchkit": "#1769aa"}


def figures(gpu: str, shape: str) -> pd.DataFrame:
    """Return ms per token by case (rows, in the order of the file) and provider (columns)."""
    rows = pd.read_csv(FOLDER / "results.csv")
    rows = rows[(rows.bench == "generate") & (rows.metric == "token")]
    rows = rows[rows.gpu.str.contains(gpu) & rows.config.str.startswith(f"{shape} ")]
    case = rows.config.str.extract(r"B(?P<batch>\d+) S(?P<length>\d+)").astype(int)
    rows = rows.join(case).sort_values(["batch", "length"], kind="stable")
    rows["case"] = rows.batch.astype(str) + " x " + rows.length.astype(str)
    newest = rows.groupby(["case", "provider"], sort=False).p50.last()
    table = newest.unstack().loc[rows.case.unique()]
    return table.dropna(subset=list(PROVIDERS), how="all")  # some fit no memory


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", default="H200")
    parser.add_argument("--shape", default="8b")
    args = parser.parse_args()
    table = figures(args.gpu, args.shape)
    print(table.round(2).to_string())
    axes = table[list(PROVIDERS)].plot.bar(
        figsize=(9, 4), width=0.8, rot=0, color=list(PROVIDERS.values()), logy=True
    )
    for place, floor in enumerate(table["floor"]):
        axes.hlines(floor, place - 0.42, place + 0.42, color="black", label="floor" * (place == 0))
    axes.set_xlabel("batch x prompt tokens")
    axes.set_ylabel("ms per token, log scale")
    axes.set_title(f"Llama-3.1-8B shape, bfloat16, {args.gpu}: whole generate() calls")
    axes.legend(title=None)
    axes.spines[["top", "right"]].set_visible(False)
    axes.figure.tight_layout()
    axes.figure.savefig(FOLDER / "generate.png", dpi=120)


if __name__ == "__main__":
    main()
