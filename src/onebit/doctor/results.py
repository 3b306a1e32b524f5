"""What results mean: rules that look through files of `onebit eval` and `onebit bench`, and give their reasons.

    findings = examine([Path("before.json"), Path("after.json")])

A rule is a function from one file, or from two that are compared, to a finding or None. Its docstring is its reason.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from onebit.doctor import measured, speeds
from onebit.doctor.finding import Finding, command, listed
from onebit.doctor.measured import Measured, Reading, change, pairs, unlike
from onebit.results import EVAL

# A byte costs 8 bits without any model.
BITS_OF_A_BYTE = 8.0
# What guessing gives.
CHANCE = {
    "hellaswag": 1 / 4,
    "arc_easy": 1 / 4,
    "arc_challenge": 1 / 4,
    "openbookqa": 1 / 4,
    "mmlu": 1 / 4,
    "piqa": 1 / 2,
    "boolq": 1 / 2,
    "winogrande": 1 / 2,
    "blimp": 1 / 2,
}
# Tasks whose answer is the likeliest token: dividing all logits by one number cannot change them. In the others the
# probabilities of several tokens are multiplied, and it can.
BY_LIKELIEST = ("boolq", "lambada", "mmlu", "gsm8k", "nq_open", "triviaqa")
# An interval that is wider says little.
WIDEST = 0.10
# Shares that matter: of requests that were cut, of perplexity that rose.
CUT, RISE = 0.01, 0.02
# Agreement below which two models are not the same one, and above which they order tokens alike.
STRANGERS, ALIKE = 0.60, 0.90
_RATHER = ("acc_norm", "acc", "exact_match", "f1")


def examine(paths: Iterable[Path]) -> list[Finding]:
    """Look through files of results; the second and all further ones are compared with the first of their kind.

    Raises:
        ValueError: a file that is no file of results.
        OSError: a file cannot be read.
    """
    files = measured.read(list(paths))
    found: list[Finding] = []
    first: dict[str, Reading] = {}
    for file in files:
        rules, compare = (RULES, PAIR_RULES) if file.kind == EVAL else (speeds.RULES, speeds.PAIR_RULES)
        said = [finding for rule in rules if (finding := rule(file))]
        if len(files) > 1:
            said = [replace(finding, evidence=f"{file.path.name}: {finding.evidence}") for finding in said]
        before = first.setdefault(file.kind, file)
        if before is not file:
            said += [finding for two in (*ALL_PAIR_RULES, *compare) if (finding := two(before, file))]
        found += said or [nothing(file, None if before is file else before)]
    return found


def nothing(file: Reading, before: Reading | None) -> Finding:
    """A file that no rule has anything to say about."""
    if not file.measured:
        return Finding(
            "note",
            "results",
            f"There is nothing in {file.path.name}",
            f"0 figures of {file.model_name}",
            "It was begun, and stopped before the first figure was there, or all of it failed.",
            command("onebit", "eval", file.model_name, "--text", "FILE", "--out", file.path),
            "Measure again.",
        )
    against = f", compared with {before.path}" if before else ""
    return Finding(
        "ok",
        "results",
        f"Nothing stands out in {file.path.name}",
        f"{len(file.measured)} figures of {file.model_name} ({file.model.get('label')}){against}",
        "Rules look for known patterns only; what they do not know they do not see.",
        next((m.command for m in file.measured if m.command), command("onebit", "doctor")),
    )


def worse_than_nothing(file: Reading) -> Finding | None:
    """A text costs more bits than its bytes have: the model does not compute what it should."""
    bad = [m for m in file.find("text", "bits_per_byte") if m.value > BITS_OF_A_BYTE]
    if not bad:
        return None
    return Finding(
        "error",
        "worse than nothing",
        f"{file.model_name} predicts worse than no model at all",
        listed([f"{m.name}: {m.describe()} bits per byte" for m in bad]),
        "A byte has 8 bits without any model. Untrained models are near that, broken ones above it: a wrong activation "
        "function, scales taken for their inverse, rows of q and k in another order, another tokenizer.",
        command("onebit", "doctor", file.model_name, "--text", bad[0].name),
        "Let the doctor try what else the config could mean (--text), and compare with the original (--against).",
    )


def at_chance(file: Reading) -> Finding | None:
    """An interval that holds what guessing gives says nothing; one below it says that something is swapped."""
    found = [(m, chance) for m in _accuracies(file) if (chance := _chance(m.name)) is not None]
    below = [f"{m.name} {m.describe('.1%')}, guessing {chance:.0%}" for m, chance in found if m.high < chance]
    level = [
        f"{m.name} {m.describe('.1%')}, guessing {chance:.0%}"
        for m, chance in found
        if m.low <= chance <= m.high
    ]
    if below:
        return Finding(
            "warning",
            "below chance",
            "Worse than guessing",
            listed(below),
            "Who knows nothing guesses right now and then. To be wrong more often takes knowledge: labels in another "
            "order, or a length of answers that decides (acc against acc_norm).",
            _repeat(file, "task"),
            "Ask a model whose score is known with the same command, and look at both metrics.",
        )
    if level:
        return Finding(
            "note",
            "at chance",
            "Tasks that this model cannot do, or that were asked too seldom",
            listed(level),
            "The interval holds what guessing gives: differences between such scores are noise.",
            _repeat(file, "task"),
            "Judge small models by perplexity, lambada, hellaswag and piqa; ask more items.",
        )
    return None


def too_few(file: Reading) -> Finding | None:
    """An interval of ten points cannot tell two models apart."""
    wide = [m for m in _accuracies(file) if m.high - m.low > WIDEST]
    if not wide:
        return None
    return Finding(
        "note",
        "few items",
        "Too few items to tell models apart",
        listed([f"{m.name} {m.describe('.1%')} of {m.more.get('n_items', '?')} items" for m in wide]),
        "An accuracy of n items has an error of about 1 / sqrt(n): 5 points of 400, 1 point of 10,000.",
        _repeat(file, "task"),
        "Raise --limit, or leave it out.",
    )


def cut(file: Reading) -> Finding | None:
    """Requests that did not fit into the context lost their beginning, often the question itself."""
    found = {m.name: m.more for m in file.measured if m.kind == "task"}
    lost = {
        name: f"{name} {more['n_cut']:,} of {more['n_requests']:,}"
        for name, more in found.items()
        if more.get("n_requests") and more.get("n_cut", 0) / more["n_requests"] > CUT
    }
    if not lost:
        return None
    return Finding(
        "warning",
        "cut",
        "Requests were longer than the context and lost their beginning",
        listed(list(lost.values())),
        "The harness keeps the end of a request; with examples before it the question may be gone, and the score is of "
        "another task.",
        _repeat(file, "task"),
        "Ask with fewer examples (--shots), or do not compare this task with models of a longer context.",
    )


def unfinished(file: Reading) -> Finding | None:
    """A task that was stopped has no score yet."""
    if not file.unfinished:
        return None
    n = sum(len(one.get("answers", ())) for one in file.unfinished.values() if isinstance(one, dict))
    return Finding(
        "note",
        "unfinished",
        "A task was not finished",
        f"{n:,} answers are kept in {file.path}",
        "Its score is not among the results.",
        _repeat(file, "task"),
        "The command that began it goes on where it stopped.",
    )


def far_from_reference(file: Reading) -> Finding | None:
    """Models of the same weights agree on most tokens; what agrees on half of them is another model."""
    far = [m for m in file.find("distance", "top1") if m.high < STRANGERS]
    if not far:
        return None
    reference = str(far[0].settings.get("reference"))
    return Finding(
        "warning",
        "far from reference",
        "Model and reference say different things",
        listed([f"{m.name}: the same likeliest token for {m.describe('.1%')}" for m in far]),
        "A conversion that keeps weight codes changes nothing; rounding of cache or head leaves 99 % of the likeliest "
        "tokens. So much less is another training, a rounding without training, or a mistake of a reader.",
        command("onebit", "convert", reference, "again.onebit", "--verify"),
        "Convert the reference again and compare part by part.",
    )


def same_order_less_sure(file: Reading) -> Finding | None:
    """Where the likeliest token stays and probabilities get worse, the order is right and the certainty is not."""
    found = []
    for worse in file.find("distance", "nll_difference"):
        top1 = [m for m in file.find("distance", "top1") if m.name == worse.name and m.value >= ALIKE]
        if top1 and worse.low > 0 and worse.value >= RISE:
            found.append(
                f"{worse.name}: {worse.describe()} nats more, the same likeliest token for {top1[0].value:.1%}"
            )
    if not found:
        return None
    return _calibrate(file, file.find("distance", "nll_difference")[0].name, listed(found))


def other_settings(before: Reading, after: Reading) -> Finding | None:
    """Figures of other texts, windows, items or threads are of something else, and are not compared."""
    found = list(unlike(before, after))
    if not found:
        return None
    shown = list(dict.fromkeys(f"{m.name}: other {', '.join(names)}" for m, names in found))
    return Finding(
        "warning",
        "not compared",
        "Figures that were measured in different ways are not compared",
        listed(shown),
        "Perplexity depends on text and windows, accuracy on items and examples, speed on threads and context.",
        found[0][0].command or _repeat(before, found[0][0].kind),
        "Measure both with the command of the first.",
    )


def labels(before: Reading, after: Reading) -> Finding | None:
    """A label names the bits of weights, activations, cache and head; two that differ hide which one it was."""
    old, new = (str(file.model.get("label", "")) for file in (before, after))
    if old == new:
        return None
    differ = [part for part, a, b in _label_parts(old, new) if a != b]
    several = len(differ) > 1
    return Finding(
        "warning" if several else "note",
        "labels",
        f"The models differ in {', '.join(differ) or 'their labels'}",
        f"{before.path.name}: {old}; {after.path.name}: {new}",
        "Two changes at once cannot be told apart: neither is the cause of a difference until it was measured alone."
        if several
        else "A comparison across labels has to name both.",
        command("onebit", "info", after.model_name),
        "Measure with one of them changed at a time (--kv-cache, --head, --encoding)." if several else "",
    )


def unsure_not_ignorant(before: Reading, after: Reading) -> Finding | None:
    """Perplexity asks how sure a model is, accuracy which answer is likeliest: only certainty got worse."""
    worse = [
        (old, new)
        for old, new in pairs(before, after)
        if old.kind in ("text", "distance")
        and old.figure == "perplexity"
        and new.value > old.value * (1 + RISE)
    ]
    tasks = _compared(before, after)
    if not worse or not tasks or any(_is_down(old, new) for old, new in tasks):
        return None
    texts = [f"perplexity of {old.name} {old.value:.4g} to {new.value:.4g}" for old, new in worse]
    steady = [_shown(old, new) for old, new in tasks]
    return _calibrate(after, worse[0][1].name, f"{listed(texts)}; {listed(steady, 4)}")


def one_task_down(before: Reading, after: Reading) -> Finding | None:
    """Whether the tasks that fell ask for a likeliest token or for a product of probabilities tells what broke."""
    tasks = _compared(before, after)
    down = [(old, new) for old, new in tasks if _is_down(old, new)]
    held = [(old, new) for old, new in tasks if not _is_down(old, new)]
    if not down or not held:
        return None
    evidence = f"down: {listed([_shown(o, n) for o, n in down], 4)}; held: {listed([_shown(o, n) for o, n in held], 4)}"
    if not any(old.name.startswith(BY_LIKELIEST) for old, _ in down):
        return _calibrate(
            after,
            "FILE",
            evidence,
            "Only tasks fell whose answers have several tokens: their probabilities are multiplied, so certainty "
            "decides. One temperature may bring them back.",
        )
    return Finding(
        "warning",
        "tasks",
        "Some tasks fell while others held, and no temperature explains it",
        evidence,
        "Among those that fell are tasks whose answer is the likeliest token, which no temperature changes: knowledge, "
        "or a long context, is lost. Recall goes first where weights are rounded, long texts where the cache is.",
        command("onebit", "eval", after.model_name, "--text", "FILE", "--against", before.model_name),
        "Measure once with --kv-cache bf16, and with a head of bf16, to see which of the roundings it is.",
    )


def all_tasks_down(before: Reading, after: Reading) -> Finding | None:
    """If everything that was asked got worse, the model did; one cause is likelier than many."""
    tasks = _compared(before, after)
    if not tasks or not all(_is_down(old, new) for old, new in tasks):
        return None
    return Finding(
        "warning",
        "tasks",
        "Every task got worse",
        listed([_shown(old, new) for old, new in tasks], 6),
        "A loss everywhere is one of the whole model: weights rounded without training, the wrong activation function, "
        "too few tokens of training.",
        command("onebit", "doctor", after.model_name, "--text", "FILE"),
        "Let the doctor look at the model itself.",
    )


def _calibrate(file: Reading, text: str, evidence: str, why: str = "") -> Finding:
    return Finding(
        "warning",
        "calibration",
        f"{file.model_name} may know as much as before and be wrongly sure of it",
        evidence,
        why
        or "The likeliest token is the same, only how likely it is changed: one number that divides logits may help.",
        command("onebit", "doctor", file.model_name, "--text", text),
        "Fit a temperature on a text of the kind that the model is for: the command does, and says what it gains.",
    )


def _accuracies(file: Reading) -> list[Measured]:
    """One accuracy for each task: what lengths decide least."""
    found: dict[str, dict[str, Measured]] = {}
    for m in file.measured:
        # "exact_match,flexible-extract" too.
        figure = m.figure.partition(",")[0]
        if m.kind == "task" and figure in _RATHER:
            found.setdefault(m.name, {}).setdefault(figure, m)
    return [next(of[name] for name in _RATHER if name in of) for of in found.values()]


def _compared(before: Reading, after: Reading) -> list[tuple[Measured, Measured]]:
    chosen = {id(m) for m in _accuracies(before)}
    return [(old, new) for old, new in pairs(before, after) if id(old) in chosen]


def _is_down(old: Measured, new: Measured) -> bool:
    difference, error = change(old, new)
    return difference < -error


def _shown(old: Measured, new: Measured) -> str:
    difference, error = change(old, new)
    return (
        f"{new.name} {old.value:.1%} to {new.value:.1%} ({100 * difference:+.1f} +- {100 * error:.1f} points)"
    )


def _chance(task: str) -> float | None:
    return next((share for name, share in CHANCE.items() if task.startswith(name)), None)


def _label_parts(old: str, new: str) -> list[tuple[str, str, str]]:
    """Weights, activations, cache and head of two labels, as in W1.58A8KV16H16."""
    found = []
    for label in (old, new):
        rest = label.partition(" ")[0]
        weights, _, rest = rest.removeprefix("W").partition("A")
        activations, _, rest = rest.partition("KV")
        cache, _, head = rest.partition("H")
        found.append((weights, activations, cache, head + label.partition(" ")[2]))
    return list(zip(("weights", "activations", "cache", "head"), *found, strict=True))


def _repeat(file: Reading, kind: str) -> str:
    """The command that measured a kind of figures."""
    commands = (m.command for m in file.measured if m.kind == kind and m.command)
    return next(commands, command("onebit", "doctor", file.model_name, "--results", file.path))


RULES: tuple[Callable[[Reading], Finding | None], ...] = (
    worse_than_nothing,
    at_chance,
    too_few,
    cut,
    unfinished,
    far_from_reference,
    same_order_less_sure,
)
ALL_PAIR_RULES: tuple[Callable[[Reading, Reading], Finding | None], ...] = (other_settings, labels)
PAIR_RULES: tuple[Callable[[Reading, Reading], Finding | None], ...] = (
    unsure_not_ignorant,
    one_task_down,
    all_tasks_down,
)
