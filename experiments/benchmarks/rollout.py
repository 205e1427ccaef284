"""`python -m experiments.benchmarks.rollout`: our engine against `generate` or `generate_batch` of transformers.

Same weights, prompts, limits and threads, no top-k or top-p, in one process and by turns. The real load is questions
through the chat template and beginnings of reviews, which end where the model ends them. The peer is the faster of
`generate` and `generate_batch`, in the dtype that is faster for it, found here first on short completions; `generate`
gets its prompts sorted by length. Tokens are those of completions, up to the one that ended each. The last column is
the share of what this machine could do at best, measured in the same run: if every weight were read once a step, or
every product ran as fast as a large one, whichever takes longer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.benchmarks.record import add_json_flag, origin, publish
from rlhf.progress import quiet

Prompts = list[list[int]]
Way = Callable[[Prompts, int], list[int]]
"""Prompts and a seed in, the tokens of each completion out."""


SEARCHED = 64
"""Tokens of a completion while the peers' dtype is searched."""


class Load(NamedTuple):
    """What all are given."""

    prompts: Prompts
    batch: int
    tokens: int
    eos: tuple[int, ...]
    pad: int


def main() -> None:
    """Measure, then print a table or JSON."""
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.rollout", description=__doc__)
    parser.add_argument("--model", default="embedded:smollm2-135m")
    parser.add_argument("--load", choices=("fixed", "real"), default="real")
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 1], help="rows decoded together")
    parser.add_argument("--waves", type=int, default=3, help="times as many prompts as rows")
    parser.add_argument("--samples", type=int, default=1, help="completions of each prompt")
    parser.add_argument("--prompt_tokens", type=int, default=96, help="of a prompt: at most, or exactly")
    parser.add_argument("--tokens", type=int, default=128, help="of a completion, at most")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    add_json_flag(parser)
    given = parser.parse_args()
    quiet()
    result = compare(given)
    publish(result, table(result), json_to=given.json)


def compare(given: argparse.Namespace) -> dict[str, Any]:
    """All batch sizes, and what the machine can do."""
    import torch

    from rlhf.memory import keep_freed_memory

    made_by = origin("experiments.benchmarks.rollout", given, seed=given.seed)
    keep_freed_memory()
    torch.set_num_threads(2)
    machine = limits()
    model, loads = prepared(given)
    return {
        **made_by,
        "machine": machine,
        "batches": {load.batch: of_load(model, load, given, machine) for load in loads},
    }


def of_load(model: Any, load: Load, given: argparse.Namespace, machine: Mapping[str, float]) -> dict[str, Any]:
    """All ways over one load, by turns."""
    searched, name, way = peer(model, load, given.seed)
    ways = {"rlhf": ours(model, load), name: way}
    ways["rlhf"](load.prompts[: load.batch], given.seed)  # the first call of each is slower
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for pair in range(given.pairs):
        for name, way in ways.items():
            run = timed(way, load.prompts, given.seed + pair)
            run["limit_seconds"] = limit(model, load, run["lengths"], machine)
            runs[name].append(run)
            report(f"batch {load.batch}, pair {pair + 1}: {name} {run['tokens'] / run['seconds']:.0f} tokens/s")
    return {"searched": searched, "runs": runs, "medians": medians(runs)}


def medians(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """Tokens a second of each way, ours as a multiple of its in the same turn, and the share of the machine's limit."""
    rates = {name: [run["tokens"] / run["seconds"] for run in each] for name, each in runs.items()}
    return {
        name: {
            "tokens_per_second": statistics.median(rates[name]),
            "ours_times_as_fast": statistics.median(a / b for a, b in zip(rates["rlhf"], rates[name], strict=True)),
            "share_of_limit": statistics.median(run["limit_seconds"] / run["seconds"] for run in runs[name]),
        }
        for name in runs
    }


def table(result: Mapping[str, Any]) -> str:
    """The medians as Markdown."""
    lines = ["| batch | | tokens/s | ours is times as fast | share of the machine's limit |", "|---|---|---|---|---|"]
    for batch, of_batch in result["batches"].items():
        for name, row in of_batch["medians"].items():
            lines.append(
                f"| {batch} | {name} | {row['tokens_per_second']:.0f} | {row['ours_times_as_fast']:.2f} "
                f"| {row['share_of_limit']:.2f} |"
            )
    machine = result["machine"]
    said = f"machine: {machine['gflops']:.0f} GFLOP/s in bf16 products, {machine['gbytes']:.1f} GB/s read from memory"
    return "\n".join([*lines, "", said])


# ---------------------------------------------------------------- the ways


def ours(model: Any, load: Load) -> Way:
    """The engine that `rlhf` chooses for the model."""
    import torch

    from rlhf import models
    from rlhf.generation.choice import engine_for

    dtype = models.compute_dtype("auto", model.device)
    engine = engine_for(model, eos_token_ids=load.eos, pad_token_id=load.pad, dtype=dtype, batch_size=load.batch)

    def generate(prompts: Prompts, seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        found = engine.generate(prompts, max_tokens=load.tokens, temperature=1.0, generator=generator)
        return [len(each.ids) for each in found]

    return generate


def peer(model: Any, load: Load, seed: int) -> tuple[list[dict[str, Any]], str, Way]:
    """The faster way of transformers, with the weights in the dtype that is faster for it; the search before it."""
    import torch

    short = load._replace(tokens=min(load.tokens, SEARCHED))
    searched: list[dict[str, Any]] = []
    made: list[Way] = []
    for name, way in (("generate", plain), ("generate_batch", continuous)):
        for dtype in (torch.float32, torch.bfloat16):
            twin = in_dtype(model, dtype)
            trial = way(twin, short)
            trial(load.prompts[: load.batch], seed)
            run = timed(trial, load.prompts[: load.batch], seed)
            rate = run["tokens"] / run["seconds"]
            searched.append({"way": name, "dtype": str(dtype).removeprefix("torch."), "tokens_per_second": rate})
            made.append(way(twin, load))
            report(f"batch {load.batch}, search: {name} in {searched[-1]['dtype']}: {rate:.0f} tokens/s")
    best = max(range(len(made)), key=lambda i: searched[i]["tokens_per_second"])
    return searched, searched[best]["way"], made[best]


def in_dtype(model: Any, dtype: Any) -> Any:
    """A copy of the model as transformers would load it."""
    import copy

    twin = copy.deepcopy(model).to(dtype)
    twin.set_attn_implementation("sdpa")
    return twin


def plain(model: Any, load: Load) -> Way:
    """`generate`, a batch after the other, prompts sorted by length and padded on the left."""
    import torch

    from rlhf.sequences import pad_rows

    config = settings(load)

    def generate(prompts: Prompts, seed: int) -> list[int]:
        torch.manual_seed(seed)
        lengths = []
        by_length = sorted(prompts, key=len, reverse=True)
        for start in range(0, len(by_length), load.batch):
            rows = by_length[start : start + load.batch]
            ids = pad_rows(rows, pad=load.pad, side="left")
            mask = pad_rows([[1] * len(row) for row in rows], pad=0, side="left")
            with torch.inference_mode():
                found = model.generate(
                    ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
                )
            lengths += [until_eos(row, load.eos) for row in found[:, ids.shape[1] :].tolist()]
        return lengths

    return generate


def continuous(model: Any, load: Load) -> Way:
    """`generate_batch`, with room for the same number of rows."""
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    config = settings(load)

    def generate(prompts: Prompts, seed: int) -> list[int]:
        how = ContinuousBatchingConfig(max_requests_per_batch=load.batch, seed=seed % 2**31)
        found = model.generate_batch(prompts, generation_config=config, continuous_batching_config=how)
        return [len(each.generated_tokens) for each in found.values()]

    return generate


def settings(load: Load) -> Any:
    """Plain sampling."""
    from transformers import GenerationConfig

    eos = list(load.eos) or None
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=load.tokens,
        eos_token_id=eos,
        pad_token_id=load.pad,
    )


def until_eos(row: Sequence[int], eos: Sequence[int]) -> int:
    """Tokens up to the one that ended the completion."""
    return next((i + 1 for i, token in enumerate(row) if token in eos), len(row))


def timed(way: Way, prompts: Prompts, seed: int) -> dict[str, Any]:
    """Seconds and lengths of one call."""
    started = time.perf_counter()
    lengths = way(prompts, seed)
    return {"seconds": time.perf_counter() - started, "tokens": sum(lengths), "lengths": lengths}


# ---------------------------------------------------------------- the load and the machine


def prepared(given: argparse.Namespace) -> tuple[Any, list[Load]]:
    """The model in fp32, and a load for each batch size."""
    from experiments.benchmarks.ppo.load import prepare
    from rlhf import models

    most = max(given.batch) * given.waves
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, model=given.model, load=given.load, count=most, prompt_tokens=given.prompt_tokens)
        tokenizer = models.load_tokenizer(str(folder / "policy"))
        model = models.load_policy(str(folder / "policy"), tokenizer).to(models.device())
        rows = [row["ids"] for row in json.loads((folder / "prompts.json").read_text(encoding="utf-8"))]
    eos = () if given.load == "fixed" else models.eos_token_ids(model, tokenizer)
    return model, [
        Load(repeated(rows, batch * given.waves, given.samples), batch, given.tokens, eos, tokenizer.pad_token_id)
        for batch in given.batch
    ]


def repeated(rows: Prompts, count: int, samples: int) -> Prompts:
    """`count` prompts, each so many times; the rows go round where there are too few."""
    distinct = -(-count // samples)
    return [rows[i % len(rows)] for i in range(distinct) for _ in range(samples)][:count]


def limits(repeats: int = 5) -> dict[str, float]:
    """What the machine can do: billions of operations a second in bf16 products, and of bytes read from memory."""
    import torch

    left, right = (torch.randn(2048, 2048).bfloat16() for _ in range(2))
    large = torch.zeros(2**28, dtype=torch.int8)
    product = min(taken(lambda: left @ right) for _ in range(repeats))
    reading = min(taken(large.view(torch.int64).sum) for _ in range(repeats))
    return {"gflops": 2 * 2048**3 / product / 1e9, "gbytes": large.numel() / reading / 1e9}


def taken(work: Callable[[], Any]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def limit(model: Any, load: Load, lengths: Sequence[int], machine: Mapping[str, float]) -> float:
    """Seconds that no engine can do without on this machine: the weights' products, or reading them once a step."""
    head = model.get_output_embeddings().weight.numel()
    body = sum(w.numel() for w in model.parameters()) - model.get_input_embeddings().weight.numel()
    body -= 0 if model.config.tie_word_embeddings else head
    tokens = sum(lengths)
    operations = 2 * body * (sum(map(len, load.prompts)) + tokens) + 2 * head * tokens
    steps = max(max(lengths), tokens / load.batch)
    return max(operations / machine["gflops"], 2 * (body + head) * steps / machine["gbytes"]) / 1e9


def report(line: str) -> None:
    """Progress, beside the result."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
