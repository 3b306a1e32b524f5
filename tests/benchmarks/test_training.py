"""Laws of sizes and tables of options say what the runs say. Kind: exact."""

import json

import numpy as np
import pytest
import training

SIZES = [81_920, 276_480, 655_360, 1_843_200, 8_110_080]


def points(a, b, c, noise=0.0):
    rng = np.random.default_rng(0)
    return [(n, a * (n / 1e6) ** -b + c + noise * rng.normal()) for n in SIZES for _ in range(3)]


def test_a_law_is_found_again():
    found = training.fit_law(points(0.5, 0.3, 0.8))
    assert (found["a_at_1M"], found["b"], found["c"]) == pytest.approx((0.5, 0.3, 0.8))
    assert found["rms"] < 1e-9
    noisy = training.fit_law(points(0.5, 0.3, 0.8, noise=0.02))
    assert noisy["b"] < 0.3 <= noisy["b_most"] + 1e-9


def test_no_law_where_there_is_none():
    assert training.fit_law(points(0, 1, 1.3, noise=0.02)) is None
    assert training.fit_law(points(0.5, 0.3, 0.8)[:9]) is None
    assert training.fit_law(points(-0.5, 0.3, 2.8)) is None


def test_options_are_compared_seed_by_seed(capsys, tmp_path):
    losses = {("default", 1): 1.0, ("default", 2): 1.1, ("default", 3): 1.2}
    losses |= {("better", 1): 0.9, ("better", 2): 0.99, ("worse", 1): 1.5, ("worse", 2): None}
    runs = [{"label": label, "seed": seed, "bits_per_byte": loss} for (label, seed), loss in losses.items()]
    found = training.options(runs, tmp_path / "options.png")
    assert found["change_percent"] == {"better": pytest.approx([-10, -10]), "worse": pytest.approx([50])}
    assert found["noise_percent"] == pytest.approx(100 * 0.1 / 1.1)
    rows = capsys.readouterr().out
    assert (
        "| better | -10.00 % (-10.00 to -10.00) | 2 |" in rows
        and "| worse | +50.00 % | 1, 1 diverged |" in rows
    )
    assert (tmp_path / "options.png").stat().st_size > 1000 and json.dumps(found)


def test_what_is_known_is_not_run_again(tmp_path):
    (tmp_path / "texts").mkdir()
    job = training.Job("ternary", "82K", "default", training.make("ternary", "82K", 0.032, 1, 300))
    known = {
        "kind": "ternary",
        "size": "82K",
        "label": "default",
        "seed": 1,
        "rate": 0.032,
        "tokens": 614_400,
    }
    (tmp_path / "texts" / "a.txt").write_text("\n\n".join(f"{i} is a number. " * 40 for i in range(2000)))
    found = training.run_all(
        [job], tmp_path / "texts", "*", tmp_path / "runs", 1, [{**known, "bits_per_byte": 1.5}]
    )
    assert found == [{**known, "bits_per_byte": 1.5}]
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["corpus"]
