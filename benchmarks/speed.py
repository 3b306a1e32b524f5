"""How fast onebit is, beside the limits of the machine and other engines, all in one run and in turn.

    make bench
    make bench BENCH="--shape large --rounds 9"

Prints a table, the targets and, last, one JSON line; writes that and a picture to benchmarks/results. What each figure
means is in benchmarks/README.md.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import picture
import plan
import report
from shapes import SHAPES

from onebit import formats
from onebit.bench.fleet import Absent, Engine, Fleet
from onebit.config import ModelConfig
from onebit.engine.model import choose_isa, choose_threads

ROOT = Path(__file__).parent.parent


def progress(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="2b4t")
    parser.add_argument(
        "--encoding", choices=["t80", "r64"], default="t80", help="layout of our linear layers"
    )
    parser.add_argument("--rounds", type=int, help="times that every measurement is made (5; quick: 2)")
    parser.add_argument("--threads", type=int, help="of the larger measurements (one for each core)")
    parser.add_argument("--isa", help="our kernels (the best that the machine has)")
    parser.add_argument(
        "--peers", default=",".join(plan.PEERS), help=f"of {', '.join(plan.PEERS)}; separated by commas"
    )
    parser.add_argument(
        "--no-peers", action="store_const", dest="peers", const="", help="onebit and limits only"
    )
    parser.add_argument(
        "--quick", action="store_true", help="two short rounds, fewer prompts: a look, no result"
    )
    parser.add_argument("--cpu", help="name of the CPU in the results' file name")
    parser.add_argument(
        "--models", type=Path, default=ROOT / "build/bench/models", help="folder of made models"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder of the results")
    args = parser.parse_args(arguments)
    args.rounds = args.rounds or (2 if args.quick else 5)
    args.peers = [name for name in args.peers.split(",") if name]
    if unknown := set(args.peers) - set(plan.PEERS):
        parser.error(f"--peers: unknown {', '.join(unknown)}; expected some of {', '.join(plan.PEERS)}")
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}; expected 1 or more")
    return args


def measure(fleet: Fleet, tasks: list[plan.Task], rounds: int, seconds: float) -> report.Results:
    """Every task once a round, in turn; every second round backwards, so that no engine always follows the same one."""
    results: report.Results = {task: report.Series() for task in tasks}
    started = time.monotonic()
    for i in range(rounds):
        for j, task in enumerate(tasks if i % 2 == 0 else reversed(tasks)):
            series = results[task]
            request = {"what": task.what, "threads": task.threads, "seconds": seconds, **dict(task.options)}
            try:
                answer = fleet.ask(task.engine, request)
            except Absent as reason:
                series.values.append(None)
                series.reason = str(reason)
            else:
                series.values.append(answer.value * plan.UNITS[task.what][0])
                series.usages += [answer.usage] if answer.usage else []
            shown = series.values[-1]
            value = series.reason if shown is None else f"{report.number(shown)} {plan.UNITS[task.what][1]}"
            progress(
                f"round {i + 1} of {rounds}, {j + 1} of {len(tasks)}, {time.monotonic() - started:,.0f} s: "
                f"{task.engine}, {task.title}, {report.count(task.threads, 'thread')}: {value}"
            )
    return results


def run(args: argparse.Namespace, config: ModelConfig) -> dict:
    """Make the models, measure, and print the table.

    Returns:
        The whole run, ready for JSON.
    """
    threads, isa = choose_threads(args.threads), choose_isa(args.isa)
    args.models.mkdir(parents=True, exist_ok=True)
    progress(f"the model of shape {args.shape}")
    path = plan.make_ours(config, args.shape, args.encoding, args.models)
    known = plan.facts(args.shape, formats.read(path), args.encoding, isa, threads)
    engines, absent = plan.own_engines(known, path), {}
    peers = [name for peer in args.peers for name in plan.PEERS[peer]]
    for name in peers:
        progress(f"the same shape for {name}")
        try:
            twin = plan.make_twin(name, args.shape, path, args.models)
        except (ValueError, ImportError) as error:
            absent[name] = " ".join(str(error).split())
            # Named in the table, though it never starts.
            engines[name] = Engine({}, 0)
        else:
            engines[name] = plan.peer_engine(name, known, twin)
    fleet = Fleet(engines)
    fleet.absent |= absent
    try:
        # What can be measured depends on the machine and on the build; both tell when they start.
        info = {name: fleet.start(name) for name in (plan.MACHINE, plan.OURS)}
        has_amx = info[plan.MACHINE]["amx"]
        tasks = plan.own_tasks(known, has_amx, args.quick)
        for name in peers:
            tasks += plan.peer_tasks(name, known, args.quick)
        # What is compared is measured close together.
        tasks.sort(key=lambda task: task.what in ("dot", "amx", "prefill", "footprint"))
        results = measure(fleet, tasks, args.rounds, 0.1 if args.quick else 0.5)
    finally:
        fleet.close()
    for name, seconds in fleet.loads_s.items():
        if seconds and name not in (plan.MACHINE, plan.OURS):
            results[plan.task(name, "load", threads)] = report.Series(list(seconds))
    order = list(engines)
    results = dict(sorted(results.items(), key=lambda item: order.index(item[0].engine)))
    machine = plan.machine_facts()
    cpus = report.count(os.cpu_count() or 1, "CPU")
    print(f"{machine['cpu']}, {cpus}, cache of {machine['cache']}; {machine['system']}")
    print(
        f"shape {args.shape}, {args.encoding}, {isa} kernels; median [least .. most] of {args.rounds} rounds"
    )
    print(
        f"a step reads {known.token_bytes / 1e6:,.1f} MB of weights, {known.linear_bytes / 1e6:,.1f} MB in layers"
    )
    print(report.table(results, known, fleet.absent, fleet.peaks, fleet.info))
    return report.as_json(
        results,
        known,
        fleet.absent,
        fleet.peaks,
        theme=f"speed-{args.shape}",
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
        commit=commit(),
        machine={**machine, "cpus": os.cpu_count()},
        rounds=args.rounds,
        quick=args.quick,
        engines=fleet.info,
    )


def commit() -> str | None:
    """The commit that is checked out, with a + if files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def main() -> None:
    """Measure, print, and write the results."""
    args = parse()
    try:
        result = run(args, SHAPES[args.shape])
    except (ValueError, OSError, Absent) as error:
        sys.exit(f"bench: {error}")
    cpu = args.cpu or report.slug(result["machine"]["cpu"], result["isa"])
    name = f"{result['theme']}{'-quick' if args.quick else ''}_{cpu}_{datetime.now(UTC):%Y%m}"
    args.out.mkdir(parents=True, exist_ok=True)
    line = json.dumps(result)
    (args.out / f"{name}.json").write_text(line + "\n")
    picture.draw(result, args.out / f"{name}.png")
    progress(f"wrote {args.out / name}.json and .png")
    print(line)


if __name__ == "__main__":
    main()
