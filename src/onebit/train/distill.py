"""From a full-precision model to a ternary or binary one of the same shape: the student learns its teacher's answers.

    teacher = formats.read("model.gguf")
    distill(build_distill("model.gguf", teacher), teacher, Path("texts"), Path("runs/student"))

The loop is that of any other training; here are the recipe, the objective and the student's first weights.
"""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from onebit.checkpoint import Checkpoint
from onebit.config import ModelConfig
from onebit.nn.transformer import States, Transformer, rope
from onebit.train import data as text
from onebit.train import losses, ranks, state
from onebit.train.loop import fit
from onebit.train.optim import Schedule
from onebit.train.origin import fingerprint, given_tokenizer
from onebit.train.recipe import (
    ROUNDING,
    Data,
    Distill,
    Recipe,
    check_shape,
    check_vocabulary,
    given_vocabulary,
    override,
)
from onebit.train.student import check_teacher, make_student, student_config
from onebit.train.task import Batch, Task, bits_per_byte
from onebit.train.teacher import ABOUT, Teacher, TopK, keep_top_k

# Below the corpus: a teacher's answers to it.
ANSWERS = "teacher"
# Sequences on which sub-norms are fitted.
_FIT_SEQUENCES = 16


@ranks.together()
def distill(recipe: Recipe, teacher: Checkpoint, data: Path | None, out: Path, resume: bool = False) -> None:
    """Train a student on a folder of text.

    Args:
        recipe: from `build_distill`.
        teacher: the model that the recipe was built for.
        data: folder with text; None where the corpus is made.
        out: run folder; made, and refused if it already holds a run, unless resume is set.
        resume: continue from the last saved state, and before training from the last answers of the teacher.

    Raises:
        ValueError: another teacher, a corpus of another tokenizer, answers of another teacher, or see `train`.
        OSError: a missing folder, a full disk, ...
    """
    d, source = recipe.distill, recipe.data
    if d is None:
        raise ValueError(f"the recipe {recipe.name} has no teacher; it is trained with: onebit train")
    folder = Path(d.corpus) if d.corpus else out / "corpus"
    is_made = bool(d.corpus) and (folder / "corpus.json").exists()
    check_teacher(teacher)
    given = given_tokenizer(teacher)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    # The device of the loop.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    asked = Teacher(teacher, recipe.precision, device)
    if asked.sha256 != d.teacher_sha256:
        raise ValueError(
            f"not the teacher of this run, which was {d.teacher} (weights {d.teacher_sha256[:16]}; found "
            f"{asked.sha256[:16]}); name that one with --teacher, or start another run"
        )
    resumed = state.open_run(recipe, folder if is_made else data, out, resume)
    corpus = ranks.in_turn(
        lambda: text.prepare(
            data, folder, source.include, source.vocab_size, source.held_out, source.seq_len, given
        ),
        folder / "corpus.json",
    )
    if not resume:
        ranks.first(lambda: state.start(recipe, out))
    answers = None
    if d.cache_logits:
        k = min(d.cache_logits, teacher.config.vocab_size)
        answers = ranks.in_turn(
            lambda: keep_top_k(folder / ANSWERS, asked, corpus, source.seq_len, k, d.temperature),
            folder / ANSWERS / ABOUT,
        )
    # Of a resumed run the state replaces the first weights.
    student = Transformer(recipe.model) if resumed else first_student(teacher, recipe, corpus)
    task = replace(distillation(recipe, corpus, asked, answers), chat_template=teacher.chat_template)
    fit(recipe, task, student, out, resumed)


def build_distill(source: str, teacher: Checkpoint, overrides: list[str] | None = None) -> Recipe:
    """The recipe of a distillation; overrides are those of `build`.

    Args:
        source: the teacher's name, as it was given.
        teacher: the teacher.
        overrides: "a.b=c" each.

    Raises:
        ValueError: a teacher that cannot be distilled, an unknown field, a value that does not fit (as a layer that
            the teacher has not), or another shape than the teacher's.
    """
    check_teacher(teacher)
    n_tokens, context = teacher.config.vocab_size, teacher.config.max_seq_len
    data = Data(vocab_size=given_vocabulary(n_tokens), seq_len=min(512, context))
    recipe = override(
        Recipe(
            name="distill",
            model=student_config(teacher.config, calibrated=False),
            data=data,
            optim=Schedule(lr=2e-3, lr_second=1e-3, warmup_steps=50),
            distill=Distill(teacher=source, teacher_sha256=fingerprint(teacher)),
        ),
        overrides or [],
    )
    assert recipe.distill is not None
    chosen = recipe.model
    rounding = {name: getattr(chosen, name) for name in ROUNDING}
    config = student_config(teacher.config, recipe.distill.sub_norm == "calibrated", **rounding)
    check_shape(chosen, config, "the student has that of its teacher", ("sub_norm",), "and distill.sub_norm")
    check_vocabulary(recipe.data, data, "that of the teacher")
    if config.weights == "dense" or recipe.options.learned_scale:
        raise ValueError(
            "a student has rounded weights, and no learned scales; change model.weights or options.learned_scale"
        )
    _check_relations(recipe.distill, config)
    return replace(recipe, model=config)


def _check_relations(chosen: Distill, config: ModelConfig) -> None:
    """Refuse a layer that is not there, and heads into which queries, keys and values cannot be cut."""
    n = config.n_layers
    if not -n <= chosen.relation_layer < n:
        raise ValueError(
            f"distill.relation_layer is {chosen.relation_layer}; the teacher has {n} layers: expected a number "
            f"from 0 to {n - 1}, or from -1 (the last) to {-n}"
        )
    widths = {name: config.linear_shapes()[name][0] for name in ("q", "k", "v")}
    if any(width % chosen.relation_heads for width in widths.values()):
        found = ", ".join(f"{name} {width}" for name, width in widths.items())
        raise ValueError(
            f"distill.relation_heads is {chosen.relation_heads}; expected a divisor of the widths of queries, keys "
            f"and values of a layer ({found}): choose a divisor of {math.gcd(*widths.values())}"
        )


def first_student(teacher: Checkpoint, recipe: Recipe, corpus: text.Corpus) -> Transformer:
    """The student before its first step; sub-norms are fitted on sequences of the corpus."""
    tokens = text.batch(corpus.train, 0, _FIT_SEQUENCES, recipe.data.seq_len, recipe.seed)
    student = make_student(teacher, recipe.model, torch.from_numpy(tokens[:, :-1]))
    return Transformer.from_checkpoint(student)


def distillation(recipe: Recipe, corpus: text.Corpus, teacher: Teacher, answers: TopK | None) -> Task:
    """The objective of a student.

        text * CE(text) + logits * KL(teacher || student) + relations * relation loss, for every token

    Measured is the held-out text in bits per byte, and `held_out_kl`, nats per token from the teacher at temperature 1.

    Args:
        recipe: with `distill`, the weights of the three.
        corpus: what is learned from.
        teacher: asked in every step, unless there are
        answers: from `keep_top_k`. Sequences then are those that the teacher was asked about, the same in all epochs.
    """
    d, seq_len, size = recipe.distill, recipe.data.seq_len, recipe.batch_size
    assert d is not None
    # Who needs nothing of a layer asks for none.
    layer = d.relation_layer % recipe.model.n_layers if d.relations else None

    def batch(step: int) -> Batch:
        n_tokens = size * seq_len
        if answers is None:
            return Batch((text.batch(corpus.train, step, size, seq_len, recipe.seed),), n_tokens)
        starts = text.starts(len(corpus.train), step, size, seq_len, recipe.seed, shifted=False)
        tokens = np.stack([corpus.train[at : at + seq_len + 1].astype(np.int64) for at in starts])
        said = [np.stack([array[at : at + seq_len] for at in starts]) for array in answers]
        return Batch((tokens, said[0].astype(np.int64), *(a.astype(np.float32) for a in said[1:])), n_tokens)

    def token_losses(model: Transformer, tokens_BT: Tensor, *said: Tensor) -> Tensor:
        inputs_BT, targets_N = tokens_BT[:, :-1], tokens_BT[:, 1:].flatten()
        states: list[States] = []
        teacher_states: list[States] = []
        student_NV = model(inputs_BT, layer, states).flatten(0, 1)
        if d.relations or (d.logits and not said):
            teacher_NV = teacher.logits(inputs_BT, layer, teacher_states).flatten(0, 1)
        total_N = torch.zeros_like(targets_N, dtype=torch.float32)
        if d.text:
            total_N = total_N + d.text * losses.cross_entropy(student_NV, targets_N)
        if d.logits and said:
            ids, log_p, log_rest = (a.flatten(0, 1) for a in said)
            kl_N = losses.top_k_kl(student_NV, ids, log_p, log_rest, d.temperature, d.tau_squared)
            total_N = total_N + d.logits * kl_N
        elif d.logits:
            total_N = total_N + d.logits * losses.logit_kl(
                student_NV, teacher_NV, d.temperature, d.tau_squared
            )
        if d.relations:
            mine, theirs = states[0], teacher_states[0]
            if d.relation_rope:
                mine, theirs = _rotated(model, mine), _rotated(teacher.model, theirs)
            relation_BT = losses.relation_loss(mine, theirs, d.relation_heads, d.relation_heads_twice)
            total_N = total_N + d.relations * relation_BT.flatten()
        return total_N

    def measure(model: Transformer, full: bool) -> dict[str, float]:
        limit = None if full else recipe.evaluate_sequences
        kl = held_out_kl(model, teacher, corpus, seq_len, recipe.evaluate_sequences)
        return {
            "held_out_bits_per_byte": bits_per_byte(model, corpus, seq_len, limit),
            "held_out_kl": kl,
        }

    provenance = {"corpus_sha256": corpus.sha256, "teacher_sha256": teacher.sha256}
    weights = {"text": d.text, "logits": d.logits, "relations": d.relations}
    loss = " + ".join(f"{weight:g} {name}" for name, weight in weights.items() if weight)
    return Task(
        batch, token_losses, measure, size * seq_len, corpus.tokenizer, provenance=provenance,
        loss=f"{loss}, nats per token",
    )  # fmt: skip


def held_out_kl(model: Transformer, teacher: Teacher, corpus: text.Corpus, seq_len: int, limit: int) -> float:
    """KL(teacher || student) in nats per token of held-out text, at temperature 1, in float32.

    Args:
        model: the student.
        teacher: asked about the same sequences.
        corpus: its held-out tokens, cut into consecutive sequences.
        seq_len: tokens of each.
        limit: sequences at most, evenly spread.
    """
    tokens, device = corpus.held_out, next(model.parameters()).device
    starts = np.arange((len(tokens) - 1) // seq_len) * seq_len
    starts = starts[np.linspace(0, len(starts) - 1, min(limit, len(starts))).astype(int)]
    total = 0.0
    with torch.no_grad():
        for at in starts:
            row = torch.from_numpy(tokens[None, at : at + seq_len].astype(np.int64)).to(device)
            total += losses.logit_kl(model(row)[0], teacher.logits(row)[0]).double().mean().item()
    return total / len(starts)


def _rotated(model: Transformer, states: States) -> States:
    """Queries and keys with their rotary positions."""
    q, k, v = states
    cos, sin = model.cos[: q.shape[2]], model.sin[: q.shape[2]]
    return rope(q, cos, sin), rope(k, cos, sin), v
