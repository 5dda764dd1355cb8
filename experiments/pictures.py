"""Pictures of a study, made from its results.json. Not a command."""
import statistics
from pathlib import Path

from simplified_tinybert.ranking.presentation import INK, LINE, TEACHER, new_figure, plain_ticks, save, style

TERMS = {"att": ("attention", "#d9822b"), "rep": ("hidden", "#1f6fb4"), "soft": ("soft", "#3a9d5d"),
         "hard": ("hard", "#8c4fb0")}


def title(results: dict, name: str) -> str:
    """Return the name of a method, or of a system such as "3/384 standard", in tables and pictures."""
    titles, (shape, _, method) = results["settings"].get("titles", {}), name.partition(" ")
    return titles.get(name) or (f"{shape} {titles[method]}" if method in titles else name)


def effectiveness_picture(results: dict, path: Path) -> None:
    """Plot the first measure against speed. Methods for one shape are spread so that all can be seen."""
    measure, systems = results["settings"]["measures"][0], results["systems"]
    methods = list(dict.fromkeys(run["method"] for run in results["tuned"]))
    figure, labelled = new_figure(1, width=7.5, height=4.4), set()
    axes, = figure.axes
    for system in systems:
        values = system["seeds"][measure]
        mean, spread = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        if system["name"] == "BM25":
            axes.axhline(mean, color=LINE, linestyle=(0, (5, 3)), linewidth=1.2, label="BM25")
        elif system["name"] == "teacher":
            axes.plot(system["pairs_per_second"], mean, "D", color=TEACHER, label=f"teacher, {system['shape']}")
        else:
            index = methods.index(system["method"])
            label = None if system["method"] in labelled else title(results, system["method"])
            labelled.add(system["method"])
            axes.errorbar(system["pairs_per_second"] * 1.06 ** (index - (len(methods) - 1) / 2), mean, spread, fmt="o",
                          color=f"C{index}", markersize=6, linewidth=1, label=label)
    rates = [system["pairs_per_second"] for system in systems if system["shape"]]
    axes.set_xscale("log")
    axes.set_xticks(*plain_ticks(min(rates) / 1.5, max(rates) * 1.5))
    axes.minorticks_off()
    axes.set_xlim(min(rates) / 1.5, max(rates) * 1.5)
    axes.set_xlabel("pairs per second (equal within a shape; spread for legibility)", fontsize=9, color=INK)
    several = any(len(system["seeds"][measure]) > 1 for system in systems)
    axes.set_ylabel(f"{measure}, ± over the seeds" if several else measure, fontsize=9, color=INK)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    style(axes, f"{results['collection']}: {measure}, {results['queries']:,} test queries")
    save(figure, path)


def losses_picture(results: dict, path: Path) -> None:
    """Plot loss terms (solid) and their gradient norms (dashed) for the first shape: proposed method and two others."""
    shape, proposed = results["curves"][0]["shape"], results["settings"]["proposed"]
    with_layers = [curve for curve in results["curves"]
                   if curve["shape"] == shape and "att_grad" in curve["rows"][0]]
    chosen = [curve for number, curve in enumerate(with_layers)
              if curve["method"] == proposed or number in (0, len(with_layers) - 1)]
    figure = new_figure(max(1, len(chosen)), width=4.2, height=3.6)
    values = [row[f"{term}_{suffix}"] for curve in chosen for row in curve["rows"] for term in TERMS
              for suffix in ("loss", "grad") if row.get(f"{term}_{suffix}")]
    for axes, curve in zip(figure.axes, chosen):
        for term, (name, colour) in TERMS.items():
            for suffix, dash in (("loss", "-"), ("grad", (0, (4, 2)))):
                points = [(row["global_step"], row[f"{term}_{suffix}"]) for row in curve["rows"]
                          if row.get(f"{term}_{suffix}")]
                if points:
                    axes.plot(*zip(*points), color=colour, linestyle=dash, linewidth=1.4,
                              label=name if suffix == "loss" else None)
        low, high = min(values) / 1.5, max(values) * 1.5
        axes.set_yscale("log")
        axes.set_yticks(*plain_ticks(low, high))
        axes.minorticks_off()
        axes.set_ylim(low, high)
        axes.set_xlabel("steps (solid: loss, dashed: norm of its gradient)", fontsize=9, color=INK)
        style(axes, f"{title(results, curve['method'])}\n{shape}")
    if chosen:
        figure.axes[-1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, path)
