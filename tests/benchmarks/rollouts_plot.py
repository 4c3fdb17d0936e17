"""rollouts.svg: what rollouts_details.json says, at a glance."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

_MAIN = ("synthetic", 64, 96)  # the rows that every policy has
Row = dict[str, Any]


def plot(rows: Sequence[Row], file: Path) -> None:
    """Bounds and overhead by policy; adaswitch by sequences in flight."""
    mpl.rcParams["svg.hashsalt"] = "rollouts"  # the same figures, the same file
    main = [row for row in rows if (row["pair"], row["in_flight"], row["max_new_tokens"]) == _MAIN]
    figure, (bounds, overhead, batches) = plt.subplots(1, 3, figsize=(13.0, 3.8), layout="constrained")
    _bars(bounds, main, {"of the serial bound": "efficiency_serial", "of the parallel bound": "efficiency_parallel"})
    bounds.axhline(1.0, color="grey", linestyle=":")
    known = [row for row in main if row["overhead_vs_on_policy"] is not None]
    _bars(overhead, known, {"measured": "overhead_vs_on_policy", "cost model": "predicted_overhead"})
    overhead.set_ylabel("time a token over on_policy's")
    for pair, max_new_tokens in sorted({(row["pair"], row["max_new_tokens"]) for row in rows}):
        line = [r for r in rows if (r["pair"], r["max_new_tokens"], r["policy"]) == (pair, max_new_tokens, "adaswitch")]
        line.sort(key=lambda row: row["in_flight"])
        batches.plot(
            [row["in_flight"] for row in line],
            [row["tokens_per_s"] for row in line],
            "o-",
            label=f"{pair}, {max_new_tokens} new tokens",
        )
    batches.set(xlabel="sequences in flight", ylabel="adaswitch, tokens/s", xscale="log", ylim=(0.0, None))
    ticks = sorted({row["in_flight"] for row in rows})
    batches.set_xticks(ticks, [str(tick) for tick in ticks])
    batches.minorticks_off()
    batches.legend(fontsize="small")
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def _bars(axes: Axes, rows: Sequence[Row], columns: dict[str, str]) -> None:
    """A group of bars for each policy."""
    width = 0.8 / len(columns)
    for number, (label, name) in enumerate(columns.items()):
        places = [place + (number - (len(columns) - 1) / 2) * width for place in range(len(rows))]
        axes.bar(places, [row[name] for row in rows], width, label=label)
    axes.set_xticks(range(len(rows)), [row["policy"] for row in rows], rotation=35, ha="right")
    axes.legend(fontsize="small")
