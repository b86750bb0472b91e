"""What a step costs, in one picture: forwards, time and memory of every recipe beside GRPO's, from the results files alone.

python benchmarks/cost_picture.py        # -> docs/pictures/cost.png
"""

import json
from pathlib import Path

HERE = Path(__file__).parent
GPU = HERE / "results/engine_step_gpu_qwen3-0.6b_fused_0.json"
ENGINE, THROUGH_VERL = HERE / "results/engine_step_one_pass_cpu.json", HERE / "results/verl_step_cpu.json"
PICTURE = HERE.parent / "docs/pictures/cost.png"
RECIPES = {
    "grpo": ("GRPO", "tab:orange"),
    "grpo_kl": ("GRPO with a\nreference", "tab:brown"),
    "vimpo": ("VIMPO,\ntwo passes", "tab:cyan"),
    "vimpo_one_pass": ("VIMPO,\none pass", "tab:blue"),
}
UPDATE = 3  # forwards that an update is worth: one, and a backward of two


def rows_of(path: Path) -> dict[str, dict]:
    return {row["recipe"]: row for row in json.loads(path.read_text())["rows"]}


def panels() -> dict[str, dict[str, list[float]]]:
    """Title of a panel -> recipe -> its bars."""
    gpu, engine, through_verl = rows_of(GPU), rows_of(ENGINE), rows_of(THROUGH_VERL)
    # The update's forward is one of those counted.
    forwards = {name: [engine[name]["forwards a sequence"] - 1 + UPDATE] for name in RECIPES}
    time = {name: [gpu[name]["to GRPO"], engine[name]["to GRPO"], through_verl[name]["to grpo"]] for name in RECIPES}
    memory = {name: [gpu[name]["peak ratio"], engine[name]["peak ratio"]] for name in RECIPES}
    return {
        "forwards a sequence, an update being 3": forwards,
        "time, GRPO = 1\n(an H200; a CPU: verl's engine, a whole run)": time,
        "peak memory, GRPO = 1\n(an H200; a CPU)": memory,
    }


def draw(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = panels()
    figure, axes = pyplot.subplots(1, len(found), figsize=(12, 3.4))
    for panel, (title, bars) in zip(axes, found.items(), strict=True):
        for place, (name, (_, colour)) in enumerate(RECIPES.items()):
            width = 0.8 / len(bars[name])
            for number, value in enumerate(bars[name]):
                x = place + (number - (len(bars[name]) - 1) / 2) * width
                panel.bar(x, value, 0.92 * width, color=colour, alpha=(1, 0.6, 0.35)[number])
                panel.text(
                    x, value, f"{value:.3g}" if value >= 3 else f"{value:.2f}", ha="center", va="bottom", fontsize=7
                )
        panel.set_xticks(range(len(RECIPES)), [label for label, _ in RECIPES.values()], fontsize=7)
        panel.set_title(title, fontsize=9)
        panel.margins(y=0.15)
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    draw(PICTURE)
