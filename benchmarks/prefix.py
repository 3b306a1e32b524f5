"""How much sooner a text begins whose first tokens were computed before, with the shipped model.

python benchmarks/prefix.py                     # 400 shared tokens, 8 of one's own, 15 pairs
"""

import argparse
import json
import statistics

import numpy as np

import onebit
from onebit.engine.sampling import SamplingParams
from onebit.llm import LLM


def pair(llm: LLM, shared: list[int], ends: list[list[int]], prefix_cache: bool) -> list[float]:
    """Milliseconds to the first token of texts that come one after another into one new engine."""
    engine = llm.engine(n_blocks=64, prefix_cache=prefix_cache)
    milliseconds = []
    for end in ends:
        request = engine.add([*shared, *end], SamplingParams(max_tokens=1, temperature=0))
        for _ in engine.run():
            pass
        milliseconds.append(1000 * (request.first_token_s - request.started_s))
    return milliseconds


def main() -> None:
    """Measure and print a table, then a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shared", type=int, default=400)
    parser.add_argument("--own", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    llm = onebit.load(threads=args.threads)
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, llm.config.vocab_size, (args.pairs + 1, args.shared + 2 * args.own)).tolist()
    result = {}
    for prefix_cache in (True, False):
        runs = []
        for row in tokens:
            shared, rest = row[: args.shared], row[args.shared :]
            runs.append(pair(llm, shared, [rest[: args.own], rest[args.own :]], prefix_cache))
        # The first pair warms up.
        first, second = zip(*runs[1:], strict=True)
        ratio = [a / b for a, b in zip(first, second, strict=True)]
        name = "with" if prefix_cache else "without"
        low, middle, high = (float(np.quantile(ratio, q)) for q in (0.25, 0.5, 0.75))
        result[name] = [round(x, 2) for x in (statistics.median(first), statistics.median(second), middle)]
        print(
            f"{name:7} prefix cache: first {result[name][0]:7.2f} ms, second {result[name][1]:7.2f} ms, "
            f"{middle:.2f} times sooner ({low:.2f} to {high:.2f})"
        )
    print(json.dumps({"label": llm.label, "isa": llm.model.isa, **vars(args), **result}))


if __name__ == "__main__":
    main()
