"""`python -m experiments.exact_optimum.figure`: draw world A's optimum, the best-of-n curve and PPO into one PNG."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.progress import quiet

if TYPE_CHECKING:
    from experiments.exact_optimum.exact import Outcome, World

FILE = Path(__file__).with_name("figure.png")
BETA = 0.5
UPDATES, EVERY = 150, 3
WAYS = {
    "k1 in the reward (this project)": (None, "#1b6ca8", "-"),
    "k2 in the reward": ("k2_in_reward", "#c0504d", "-"),
    "k3 in the reward": ("k3_in_reward", "#e3a857", "-"),
    "k1 in the loss": ("k1_in_loss", "#1b6ca8", ":"),
    "k2 in the loss": ("k2_in_loss", "#c0504d", ":"),
    "k3 in the loss": ("k3_in_loss", "#e3a857", ":"),
}
"""Label -> fault, colour, line style."""


def path(fault: str | None) -> list[Outcome]:
    """Where PPO is in world A, before training and after every few updates."""
    from experiments.exact_optimum import exact, tabular
    from experiments.exact_optimum.faults import FAULTS

    world, reference = tabular.world()
    found: list[tuple[int, Any]] = []

    def watch(step: int, table: tabular.Table) -> None:
        if step % EVERY == 0:
            found.append((step, exact.logprobs_of(table, world.sequences)))

    with FAULTS[fault](BETA) if fault else nullcontext():
        tabular.train(world, reference, beta=BETA, seed=0, updates=UPDATES, watch=watch)
    return [exact.outcome(world, logprobs.sum(1), BETA) for _, logprobs in found]


def main() -> None:
    """Train in all six ways and draw."""
    quiet()
    from matplotlib.figure import Figure

    from experiments.exact_optimum import tabular

    world, _ = tabular.world()
    paths = {label: path(fault) for label, (fault, _, _) in WAYS.items()}
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_training(left, paths, world)
    draw_frontier(right, paths["k1 in the reward (this project)"], world)
    figure.savefig(FILE, dpi=110)
    print(FILE)


def draw_training(axes: Any, paths: dict[str, list[Outcome]], world: World) -> None:
    """J during training, for each way to hold the policy near its reference."""
    for label, (_, colour, style) in WAYS.items():
        objectives = [at.objective for at in paths[label]]
        axes.plot(range(0, UPDATES + 1, EVERY), objectives, style, color=colour, label=label)
    axes.axhline(world.value_of_optimum(BETA), color="black", linewidth=0.8)
    axes.annotate("exact optimum", (UPDATES, world.value_of_optimum(BETA)), ha="right", va="bottom", fontsize=9)
    axes.set(xlabel="update", ylabel=f"J = E[score] - {BETA} KL", ylim=(-1.0, 0.75), title="Where the KL penalty goes")
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def draw_frontier(axes: Any, ours: list[Outcome], world: World) -> None:
    """Score against KL: the best there is, best of n, and PPO on its way."""
    from experiments.exact_optimum import exact

    betas = [0.15 * 1.08**i for i in range(60)]
    best = [exact.outcome(world, world.optimum(beta), beta) for beta in betas]
    axes.plot([at.kl for at in best], [at.score for at in best], color="black", linewidth=0.8, label="exact frontier")
    picked = {n: exact.best_of_n(world, n) for n in (1, 2, 4, 8, 16, 64)}
    axes.plot(
        *zip(*((kl, score) for score, kl in picked.values()), strict=True), "s--", color="#888", label="best of n"
    )
    for n, (score, kl) in picked.items():
        axes.annotate(f"n = {n}", (kl, score), textcoords="offset points", xytext=(6, -10), fontsize=8, color="#666")
    axes.plot([at.kl for at in ours], [at.score for at in ours], ".-", color="#1b6ca8", label="PPO in training")
    axes.plot(ours[-1].kl, ours[-1].score, "o", color="#1b6ca8")
    axes.set(
        xlabel="KL(policy || reference), nats",
        ylabel="E[score]",
        xlim=(-0.1, 3.5),
        ylim=(-0.4, 2.2),
        title="What the KL buys",
    )
    axes.legend(frameon=False, fontsize=8, loc="lower right")


if __name__ == "__main__":
    main()
