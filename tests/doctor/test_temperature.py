"""One temperature for the head. Kinds: oracle (a search over all of a grid, in float64), invariant, exact."""

from dataclasses import replace

import numpy as np
import pytest

from onebit import formats
from onebit.checkpoint import with_temperature
from onebit.doctor import temperature
from onebit.doctor.temperature import calibration_error, fit, inverse_temperature, judge
from onebit.eval.figures import Figure
from onebit.llm import LLM, SHIPPED_MODEL


@pytest.fixture(scope="module")
def llm():
    return LLM(formats.read(SHIPPED_MODEL), threads=1, speculation=False)


@pytest.fixture(scope="module")
def text(llm):
    """What the model itself says, every token drawn as likely as the model has it."""
    outputs = llm.generate(["Once upon a time"] * 4, max_tokens=400, temperature=1, top_k=0, top_p=1, seed=5)
    seeds = llm.generate(["One day"] * 4, max_tokens=400, temperature=1, top_k=0, top_p=1, seed=6)
    return "\n\n".join(output.text for output in [outputs[0], seeds[0]])


def by_grid(logits, targets, betas):
    """The best of many numbers, each tried."""
    z, rows = logits.astype(np.float64), np.arange(len(targets))
    z -= z.max(axis=1, keepdims=True)
    nll = [np.mean(np.log(np.exp(beta * z).sum(axis=1)) - beta * z[rows, targets]) for beta in betas]
    return betas[int(np.argmin(nll))]


@pytest.mark.parametrize("truth", [0.3, 0.8, 1.0, 2.5])
def test_the_best_number_is_that_of_a_search(truth):
    rng = np.random.default_rng(0)
    logits = (3 * rng.standard_normal((400, 50)) + 7).astype(np.float32)
    p = np.exp(truth * logits - (truth * logits).max(axis=1, keepdims=True))
    targets = np.array([rng.choice(50, p=row / row.sum()) for row in p.astype(np.float64)], np.int32)
    beta, slopes, curvature = inverse_temperature(logits, targets)
    assert beta == pytest.approx(by_grid(logits, targets, np.linspace(0.2, 3, 1401)), abs=1.1e-3)
    assert abs(slopes.mean()) < 1e-3 * curvature


@pytest.mark.parametrize(("sign", "limit"), [(1, 8.0), (-1, 1 / 8)])
def test_without_a_best_number_it_is_the_last_one(sign, limit):
    logits = np.random.default_rng(0).standard_normal((40, 9)).astype(np.float32)
    best = (sign * logits).argmax(axis=1).astype(np.int32)
    assert inverse_temperature(logits, best)[0] == pytest.approx(limit, rel=0.01)


def test_a_factor_on_all_logits_comes_back(llm, text):
    found = fit(llm, text)
    # The text is drawn from the model: it is as sure as it is right.
    assert found.temperature.low < 1.02 and found.temperature.high > 0.98
    for factor in (0.6, 1.7):
        changed = LLM(with_temperature(llm.checkpoint, 1 / factor), threads=1, speculation=False)
        again = fit(changed, text)
        assert again.temperature.value == pytest.approx(factor * found.temperature.value, rel=0.005)
        assert again.nll_after.value == pytest.approx(found.nll_after.value, rel=1e-3)
        assert again.nll_difference.high < 0 and again.ece_after.value < again.ece_before.value
        assert judge(again, "model.onebit", "text.txt").severity == "warning"
    assert judge(found, "model.onebit", "text.txt").severity == "ok"


def test_the_last_norm_carries_a_temperature(llm, tmp_path):
    cooled = with_temperature(llm.checkpoint, 1.25)
    formats.write(cooled, tmp_path / "cooled.onebit")
    again = LLM(formats.read(tmp_path / "cooled.onebit"), threads=1, speculation=False)
    ids = llm.tokenizer.encode("Once upon a time there was a dog")
    assert np.allclose(again.logits(ids) * np.float32(1.25), llm.logits(ids), rtol=0, atol=2e-3)
    assert again.checkpoint.provenance["head_temperature"] == 1.25
    assert again.checkpoint.provenance["steps"] == llm.checkpoint.provenance["steps"]
    texts = [one.generate("The dog", max_tokens=20, temperature=0).text for one in (llm, again)]
    assert texts[0] == texts[1]


def test_a_temperature_of_a_master(llm):
    import tiny

    whole = tiny.master()
    changed = with_temperature(whole, 2.0)
    assert np.array_equal(changed.tensors["norm.weight"] * 2, whole.tensors["norm.weight"])


def test_calibration_errors():
    half = np.full(1000, 0.5)
    right = np.tile([0.0, 1.0], 500)
    assert calibration_error(half, right).value == pytest.approx(0, abs=0.02)
    assert calibration_error(half, np.ones(1000)).value == pytest.approx(0.5)
    found = calibration_error(np.linspace(0.2, 1, 1000), right)
    # Equal shares of tokens: the mean of |sure - 1/2| over [0.2, 1].
    assert found.value == pytest.approx((0.3**2 + 0.5**2) / 2 / 0.8, abs=0.02)
    assert found.low < found.value < found.high


@pytest.mark.parametrize(
    ("gain", "severity"),
    [((-0.2, -0.3, -0.1), "warning"), ((-0.2, -0.5, 0.1), "ok"), ((-0.001, -0.002, -0.0005), "ok")],
)
def test_only_a_gain_beyond_chance_is_worth_a_word(llm, gain, severity):
    value, low, high = gain
    one = Figure(1.0, 0.1, 0.8, 1.2, 100)
    made = temperature.Fit(
        Figure(1.4, 0.1, 1.2, 1.6, 100), one, one, Figure(value, 0.1, low, high, 100), one, one, 9
    )
    found = judge(made, "a model.gguf", "text.txt")
    assert found.severity == severity
    if severity == "warning":
        assert "too sure" in found.what and "--temperature 1.40" in found.advice
        assert "'a model.gguf'" in found.confirm
        flat = judge(replace(made, temperature=Figure(0.7, 0.1, 0.6, 0.8, 100)), "m", "t")
        assert "not sure enough" in flat.what


def test_texts_that_are_too_short(llm):
    with pytest.raises(ValueError, match="at least 128: give a longer text"):
        fit(llm, "Once upon a time")
