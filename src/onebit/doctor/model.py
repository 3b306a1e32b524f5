"""The model: is the file whole, and do its config, tokenizer and weights mean what they say.

    findings, checkpoint = examine("model.gguf")

Models of others are looked at as they are, before anything is converted.
"""

import math
from collections.abc import Callable
from pathlib import Path

from onebit import formats
from onebit.checkpoint import Checkpoint
from onebit.doctor import weights, words
from onebit.doctor.finding import Finding, command
from onebit.engine.memory import outlook, position_bytes
from onebit.formats.compare import kind_of
from onebit.formats.families import family
from onebit.parts import token_bytes

# The published models have 1e-6 to 1e-5.
SMALLEST_EPS, LARGEST_EPS = 1e-8, 1e-3


def examine(
    name: str,
    path: Path,
    available: int | None = None,
    progress: formats.Progress = lambda what, share: None,
) -> tuple[list[Finding], Checkpoint | None]:
    """Look at a model.

    Args:
        name: what the user calls it, for the commands.
        path: where it lies.
        available: bytes of memory for this process, or None where that is not known.
        progress: called now and then.

    Returns:
        The findings, and the model; None of one that cannot be read.
    """
    try:
        checkpoint = formats.read(path)
        is_file = formats.is_native(path) and path.is_file()
        found: list[Finding | None] = [hashes(path, name, progress)] if is_file else []
    except ValueError as error:
        return [refused(error, name)], None
    found += [check(checkpoint, name) for check in (*CHECKS, *words.CHECKS)]
    found.append(fits(checkpoint, name, available))
    seen = weights.look(checkpoint, lambda share: progress("reading the weights", share))
    found += [check(seen, name) for check in weights.CHECKS]
    return [finding for finding in found if finding], checkpoint


def refused(error: ValueError, name: str) -> Finding:
    """A model that its reader does not take."""
    return Finding(
        "error",
        "file",
        "The model is refused",
        str(error),
        "Readers refuse what they would compute wrongly: damaged bytes, scales that contradict the config, parts that "
        "are missing, settings that nobody here knows.",
        command("onebit", "info", name),
        "The evidence says what was expected; docs/families.md lists the models that run.",
    )


def hashes(path: Path, name: str, progress: formats.Progress) -> Finding:
    """Whether every byte of a .onebit file is as it was written."""
    progress("checking the hashes", 0.0)
    confirm = command("onebit", "info", name, "--verify")
    why = "A flipped bit in a code or a scale makes a model worse without a word."
    try:
        formats.native.verify(path)
    except ValueError as error:
        advice = "Fetch or convert the file again; if it happens twice, test the disk and the memory."
        return Finding("error", "file", "The file is damaged", str(error), why, confirm, advice)
    evidence = f"{path.stat().st_size:,} bytes, and the hash of each tensor"
    return Finding("ok", "file", "Every byte is as it was written", evidence, why, confirm)


def label(checkpoint: Checkpoint, name: str) -> Finding:
    """How many bits weights, activations and cache have; a full-precision model is said to be one."""
    config = checkpoint.config
    confirm = command("onebit", "info", name)
    linear = (tensor for tensor_name, tensor in checkpoint.tensors.items() if config.is_linear(tensor_name))
    kinds = ", ".join(sorted({kind_of(tensor) for tensor in linear}))
    evidence = f"{config.weights} weights stored as {kinds}, activations {config.activations}"
    if config.weights == "dense":
        return Finding(
            "note",
            "label",
            "A full-precision model: no layer is ternary or binary",
            evidence,
            "It runs, and reads ten times the bytes for each token. Rounding it to ternary afterwards destroys it: "
            "ternary models are trained so.",
            confirm,
            "A ternary student can be trained of it: onebit distill --teacher MODEL --data texts --out RUN.",
        )
    why = "Figures of models with other labels are not comparable without saying so."
    return Finding("ok", "label", f"The model is {checkpoint.label}", evidence, why, confirm)


def activations(checkpoint: Checkpoint, name: str) -> Finding | None:
    """Whether the file says how inputs of linear layers are rounded."""
    source = checkpoint.provenance.get("source")
    said = source.get("activations") if isinstance(source, dict) else None
    if not isinstance(said, str) or "guessed" not in said or checkpoint.is_packed:
        return None
    return Finding(
        "note",
        "activations",
        "How activations are rounded is a guess: the file does not say",
        said,
        "A model that was trained with 8-bit activations expects them; one that was not loses by them.",
        command("onebit", "eval", name, "--text", "FILE"),
        "Look into the paper or card of the model; a Hugging Face folder says it in quantization_config.",
    )


def feed_forward(checkpoint: Checkpoint, name: str) -> Finding:
    """Which function gates the feed-forward layers, and whether its recipe, or the model's family, has it."""
    config = checkpoint.config
    names = {"relu2": "squared ReLU", "silu": "SiLU"}
    chosen, norms = names[config.activation], "with" if config.sub_norm else "without"
    evidence = f"activation {config.activation}, {norms} norms inside attention and feed-forward"
    confirm = command("onebit", "doctor", name, "--text", "FILE")
    why = (
        "BitNet b1.58 2B4T has squared ReLU, the older 1bitLLM models, most that onebit trains and all Llamas SiLU; "
        "with the wrong one a model loads and its perplexity rises from 17 to 100 (microsoft/BitNet#588)."
    )
    trained = _trained_activation(checkpoint)
    if trained and trained != config.activation:
        what = f"Feed-forward layers have {chosen}, but were trained with {names[trained]}"
        return Finding("warning", "gate", what, evidence, why, confirm, "Correct activation in the config.")
    if trained or config.sub_norm == (config.activation == "relu2"):
        return Finding("ok", "gate", f"Feed-forward layers have {chosen}", evidence, why, confirm)
    advice = "--text FILE measures the model with either function."
    what = f"{chosen} {norms} inner norms: right for few models"
    return Finding("note", "gate", what, evidence, why, confirm, advice)


def _trained_activation(checkpoint: Checkpoint) -> str | None:
    """What the recipe in a file says, if there is one that says it: provenance is anybody's JSON."""
    at: object = checkpoint.provenance
    for key in ("recipe", "model", "activation"):
        at = at.get(key) if isinstance(at, dict) else None
    return at if at in ("silu", "relu2") else None


def rotary(checkpoint: Checkpoint, name: str) -> Finding:
    """Whether rotary positions are told apart within the context.

    The slowest pair of a head turns once in 2 pi theta^((d - 2) / d) positions; further apart two positions look alike.
    """
    config = checkpoint.config
    longest = math.tau / min(config.rope_frequencies())
    scaling = config.rope_scaling.rope_type if config.rope_scaling else "no"
    evidence = (
        f"context {config.max_seq_len:,}, theta {config.rope_theta:g}, {scaling} scaling; the slowest pair turns once "
        f"in {longest:,.0f} positions"
    )
    why = (
        "The base theta differs among models with the same names of tensors (10,000, 500,000, 1,000,042); a wrong one, "
        "or a lost rope_scaling, shows only in longer texts."
    )
    confirm = command("onebit", "doctor", name, "--text", "FILE")
    if config.max_seq_len > longest:
        advice = "Compare rope_theta and rope_scaling with the config of the original."
        what = "The context is longer than rotary positions can tell apart"
        return Finding("warning", "positions", what, evidence, why, confirm, advice)
    return Finding(
        "ok", "positions", f"Positions differ in all {config.max_seq_len:,} tokens", evidence, why, confirm
    )


def norm_eps(checkpoint: Checkpoint, name: str) -> Finding | None:
    """An epsilon of norms that no published model has."""
    eps = checkpoint.config.norm_eps
    if SMALLEST_EPS <= eps <= LARGEST_EPS:
        return None
    return Finding(
        "warning",
        "epsilon",
        f"The epsilon of norms is {eps:g}",
        f"norm_eps {eps:g}; published models have 1e-6 or 1e-5",
        "It is added to the mean square before the root: a large one shrinks small inputs, and the answers drift.",
        command("onebit", "info", name),
        "Compare with rms_norm_eps of the original.",
    )


def ways_out(checkpoint: Checkpoint, name: str) -> Finding | None:
    """A mixture of flags that no known family has."""
    try:
        family(checkpoint.config)
    except ValueError as error:
        return Finding(
            "note",
            "family",
            "No known family of models has these flags together",
            str(error),
            "Such a model runs here; other programs would compute something else, so it cannot be written for them.",
            command("onebit", "info", name),
        )
    return None


def fits(checkpoint: Checkpoint, name: str, available: int | None) -> Finding | None:
    """What happens to the model in the memory that is free."""
    # Of a float32 master nothing is in memory as the engine will have it.
    if available is None or not checkpoint.is_packed:
        return None
    read = token_bytes(checkpoint)
    said = outlook(checkpoint.config, read, position_bytes(checkpoint.config), available)
    evidence = (
        f"{said}; {available / 1e9:.1f} GB are available, a token reads {read / 1e6:,.1f} MB of weights"
    )
    confirm = command("onebit", "info", name)
    why = "What does not fit is read from the disk again for every token."
    if said.startswith("fits into memory with its whole context"):
        return Finding("ok", "memory", "The model fits into memory", evidence, why, confirm)
    if said.startswith("fits"):
        advice = "A smaller cache holds twice as much: --kv-cache int8."
        return Finding("note", "memory", "Memory holds a part of the context", evidence, why, confirm, advice)
    advice = "Free memory, raise the container's limit, or take a smaller model."
    return Finding("warning", "memory", "The model is larger than memory", evidence, why, confirm, advice)


CHECKS: tuple[Callable[[Checkpoint, str], Finding | None], ...] = (
    label,
    activations,
    feed_forward,
    rotary,
    norm_eps,
    ways_out,
)
