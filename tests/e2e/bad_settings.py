"""The faults of rewards, rankings, settings and outputs, in the form of `bad_input`."""

from __future__ import annotations

from tests.e2e.bad_input import Case, lines, ranked

CASES: dict[str, Case] = {
    # ---- rewards
    "NaN": Case("ppo", ("mine:nan returned nan", "must be finite"), "--reward mine:nan"),
    "infinite": Case("evaluate", ("mine:infinite returned -inf", "must be finite"), "--reward mine:infinite"),
    "a reward that fails": Case(
        "ppo",
        ("mine:fails failed", "ZeroDivisionError", "mine.py, line 7", "reward(prompts, completions)"),
        "--reward mine:fails",
    ),
    "a judge that fails": Case(
        "evaluate", ("mine:fails failed", "ZeroDivisionError", "mine.py, line 7"), "--judge mine:fails"
    ),
    "too few scores": Case("ppo", ("mine:short returned 1 scores for 4", "one for each"), "--reward mine:short"),
    "words for scores": Case("ppo", ("mine:words returned 'good'", "numbers"), "--reward mine:words"),
    "no scores": Case("ppo", ("mine:nothing returned a NoneType", "return a list of numbers"), "--reward mine:nothing"),
    "one score": Case("ppo", ("mine:one returned a float", "return a list of numbers"), "--reward mine:one"),
    "a table of scores": Case("ppo", ("mine:table returned a dict", "return a list of numbers"), "--reward mine:table"),
    "lists of scores": Case("ppo", ("mine:nested returned [1.0, 2.0]", "return a number"), "--reward mine:nested"),
    "another signature": Case(
        "ppo", ("mine:completions_only", "TypeError", "reward(prompts, completions)"), "--reward mine:completions_only"
    ),
    "no such function": Case("ppo", ("mine has no 'goood'", "did you mean 'good'?"), "--reward mine:goood"),
    "no function": Case("ppo", ("'mine:number' is a int, not a function",), "--reward mine:number"),
    "no such module": Case(
        "ppo", ("no module 'nothing_here'", "among the installed packages"), "--reward nothing_here:f"
    ),
    "a module that does not parse": Case(
        "ppo", ("SyntaxError", "broken.py, line 2", "mend"), "--reward broken:f", {"broken.py": "\ndef f(:\n"}
    ),
    "a module that fails": Case(
        "ppo",
        ("KeyError: 'HOME_OF'", "failing.py, line 1", "mend"),
        "--reward failing:f",
        {"failing.py": "{}['HOME_OF']\n"},
    ),
    # ---- rankings
    "no rankings": Case("reward", ("rankings.jsonl", "it is empty", "collect some"), files={"rankings.jsonl": ""}),
    "no store": Case("reward", ("no label store at a.db", "`rlhf sample`"), "--rankings a.db"),
    "rank out of range": Case(
        "reward", ("rankings.jsonl", "line 1", "rank 4", "1 to 3: 1 is best"), files=ranked(ranks=[1, 2, 4])
    ),
    "ranks as words": Case(
        "reward", ("line 1", "rank '1' is not an integer", "1 is best"), files=ranked(ranks=["1", "2", "3"])
    ),
    "too few ranks": Case(
        "reward",
        ("line 1", "2 ranks for 3 completions", "give one rank (or null) for each"),
        files=ranked(ranks=[1, 2]),
    ),
    "unknown ids": Case(
        "reward", ("line 1", "presented_order [0, 1, 7]", "indices 0 to 2"), files=ranked(presented_order=[0, 1, 7])
    ),
    "duplicate ids": Case(
        "reward", ("line 1", "presented_order [0, 0, 1]", "indices 0 to 2"), files=ranked(presented_order=[0, 0, 1])
    ),
    "the same completions": Case(
        "reward", ("fewer than two different completions", "Give more"), files=ranked(completions=[" a", " a", " a"])
    ),
    "a ranking that is a list": Case(
        "reward", ("line 1", "no row with named columns"), files={"rankings.jsonl": '"a"\n[1]\n'}
    ),
    "columns of rankings": Case(
        "reward",
        ("no 'completions'", "found prompt", "--columns.completions"),
        files={"rankings.jsonl": lines({"prompt": "a"})},
    ),
    "half a pair": Case(
        "reward",
        ("rankings.jsonl:1", "no column 'rejected'", "--columns.rejected"),
        files={"rankings.jsonl": lines({"prompt": "a", "chosen": "b"})},
    ),
    "an unknown annotator": Case("reward", ("no ranking by you", "but by me"), "--annotators [you]"),
    "training that diverges": Case("reward", ("diverged", "lower learning_rate"), "--learning_rate 1e9 --epochs 4"),
    "nothing to rank": Case("label", ("labels.db", "round 3", "`rlhf sample`"), "--round 3"),
    "no database": Case(
        "label", ("prompts.jsonl cannot be opened (file is not a database)", "--store"), "--store prompts.jsonl"
    ),
    "a utility that fails": Case(
        "label",
        ("mine:utility_fails", "IndexError", "mine.py, line", "utility(prompt, completion)"),
        "--simulate.utility mine:utility_fails",
    ),
    "a utility that is NaN": Case(
        "label", ("mine:utility_nan returned nan", "finite number"), "--simulate.utility mine:utility_nan"
    ),
    # ---- settings
    "an unknown flag": Case("ppo", ("no flag --kl_cof", "did you mean --kl_coef?"), "--kl_cof 1"),
    "an unknown key": Case(
        "ppo",
        ("a.yaml, line 2", "`extras.dualclip`", "did you mean `extras.dual_clip`?"),
        "--config a.yaml",
        {"a.yaml": "extras:\n  dualclip: 3\n"},
    ),
    "out of range, nested": Case(
        "ppo", ("extras.dual_clip is 0.5", "above 1"), "--config a.yaml", {"a.yaml": "extras:\n  dual_clip: 0.5\n"}
    ),
    "out of range, one of several types": Case(
        "ppo", ("trainable.last_layers is 0", "at least 1"), "--trainable.last_layers 0"
    ),
    "more layers than there are": Case(
        "ppo", ("last_layers is 30", "has 3 layers", "at most"), "--trainable.last_layers 30"
    ),
    "every 0 steps": Case("ppo", ("save_every is 0", "above 0"), "--save_every 0"),
    "not finite": Case("ppo", ("kl_coef is nan", "finite"), "--config a.yaml", {"a.yaml": "kl_coef: .nan\n"}),
    "a seed in words": Case("ppo", ("seed is 'text'", "INT"), "--seed text"),
    "no seed": Case("ppo", ("seed is ''", "INT"), "--seed="),
    "a value for a group": Case(
        "ppo", ("a.yaml, line 1", "`extras` is '3'", "indented below"), "--config a.yaml", {"a.yaml": "extras: 3\n"}
    ),
    "an empty group": Case(
        "ppo", ("a.yaml, line 1", "`extras` is empty", "indented below"), "--config a.yaml", {"a.yaml": "extras:\n"}
    ),
    "an empty config": Case("ppo", ("a.yaml is empty", "`key: value`"), "--config a.yaml", {"a.yaml": "# nothing\n"}),
    "a config in words": Case(
        "ppo", ("a.yaml holds no settings", "`key: value`"), "--config a.yaml", {"a.yaml": "hello\n"}
    ),
    "a config with tabs": Case(
        "ppo",
        ("a.yaml, line 2", "a tab: indent with spaces"),
        "--config a.yaml",
        {"a.yaml": "extras:\n\tdual_clip: 2\n"},
    ),
    "a config with odd keys": Case(
        "ppo", ("a.yaml, line 1", "there is no setting"), "--config a.yaml", {"a.yaml": "? [a, b]\n: 3\n"}
    ),
    "a config in Latin-1": Case(
        "ppo", ("a.yaml is not UTF-8", "save the file as UTF-8"), "--config a.yaml", {"a.yaml": b"reward: caf\xe9\n"}
    ),
    "no config": Case("ppo", ("--config nowhere.yaml cannot be read", "No such file"), "--config nowhere.yaml"),
    # ---- where results go
    "output is a file": Case(
        "ppo", ("prompts.jsonl cannot be written to", "choose another --output"), "--output prompts.jsonl"
    ),
    "output below a file": Case(
        "sft", ("prompts.jsonl/run cannot be written to", "choose another --output"), "--output prompts.jsonl/run"
    ),
    "output where nobody may write": Case(
        "evaluate", ("/proc/run cannot be written to", "choose another --output"), "--output /proc/run"
    ),
    "store where nobody may write": Case(
        "sample", ("/proc/run cannot be made", "choose another --store"), "--store /proc/run/a.db"
    ),
}
