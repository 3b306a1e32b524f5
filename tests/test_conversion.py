"""Conversions, proven by running both models. Kinds: invariant (a copy answers the same), exact (losses are seen)."""

import errno
from dataclasses import replace

import numpy as np
import pytest

import tiny
from onebit import LLM, convert, formats
from onebit.checkpoint import quantize
from onebit.conversion import distance


@pytest.fixture
def folder(tmp_path):
    formats.run.write(tiny.master(), tmp_path / "run")
    return tmp_path


def test_a_faithful_conversion_has_no_distance(folder):
    seen = []
    report, found = convert(
        folder / "run",
        folder / "x.onebit",
        verify=True,
        progress=lambda what, share: seen.append((what, share)),
    )
    assert found and (found.kl, found.largest, found.top1) == (0, 0, 1) and found.n_same == found.n_greedy > 8
    assert "bit for bit" in found.describe() and not report.losses
    assert {what for what, _ in seen} == {"comparing", "verifying"}
    assert convert(folder / "run", folder / "y.onebit").distance is None


@pytest.mark.parametrize("name", ["x.onebit", "x.gguf", "x"])
def test_a_temperature_stays_with_the_model(tmp_path, name):
    def logits(file):
        return LLM(formats.read(tmp_path / file), threads=1).logits([5, 6, 7, 8])

    formats.run.write(tiny.master(tiny.config(sub_norm=False, activation="silu")), tmp_path / "run")
    options = {"encoding": "F32" if name == "x.gguf" else None, "allow_lossy": True}
    convert(tmp_path / "run", tmp_path / name, **options)
    before = logits(name)
    for temperature, tolerance in ((2.0, 0), (0.5, 0), (1.3, 2e-4)):
        report, _ = convert(tmp_path / "run", tmp_path / f"hot.{name}", **options, temperature=temperature)
        assert f"logits are those of the source divided by {temperature:g}" in report.notes
        assert (
            abs(logits(f"hot.{name}") * np.float32(temperature) - before).max()
            <= tolerance * abs(before).max()
        )
    for wrong in (0, -1, 1001, float("nan")):
        with pytest.raises(ValueError, match="temperature is .*; expected a number from 0.001"):
            convert(tmp_path / "run", tmp_path / name, temperature=wrong)


def test_another_model_is_far_away():
    packed = quantize(tiny.master())
    found = distance(packed, quantize(tiny.master(seed=1)))
    assert found.kl > 0.1 and found.top1 < 0.5 and found.n_same < found.n_greedy
    assert f"{found.n_same} of {found.n_greedy} greedy tokens are the same" in found.describe()
    # The divergence of what the engine itself says.
    same = distance(packed, packed)
    assert same.perplexity[0] == same.perplexity[1] == pytest.approx(found.perplexity[0])


def test_a_model_without_tokenizer_is_probed_with_token_ids():
    packed = replace(quantize(tiny.master()), tokenizer=None)
    found = distance(packed, packed)
    assert found.largest == 0 and found.n_tokens == tiny.CONFIG.max_seq_len // 2


def test_another_tokenizer_is_seen():
    packed = quantize(tiny.master())
    # One that knows fewer words, and one whose texts begin with a token.
    others = [replace(packed, tokenizer=tiny.tokenizer_json(300))]
    others.append(replace(packed, config=replace(packed.config, bos_token=0)))
    for other in others:
        found = distance(packed, other)
        assert found.largest == 0 and not found.same_tokens and "tokenizers differ" in found.describe()
    assert distance(packed, packed).same_tokens


def test_a_loss_must_be_allowed(folder):
    twin = tiny.master(tiny.config(weights="dense", activations="none"))
    formats.write(quantize(twin), folder / "twin.onebit")
    with pytest.raises(ValueError, match="cannot hold dense weights"):
        convert(folder / "twin.onebit", folder / "x.onebit", "t80")
    formats.run.write(twin, folder / "twin")
    with pytest.raises(
        ValueError, match=r"is not written.*its dense weights are rounded to b1.58.*--allow-lossy"
    ):
        convert(folder / "twin", folder / "x.onebit", "t80")
    assert not (folder / "x.onebit").exists() and not list(folder.glob(".*"))
    report, found = convert(folder / "twin", folder / "x.onebit", "t80", allow_lossy=True, verify=True)
    assert [change.part for change in report.losses] == ["embedding", "linear"]
    assert "weights: dense becomes b1.58" in report.notes and report.made.label == "W1.58A8KV16H16"
    assert found.kl > 0


def test_a_file_that_replaces_its_source_cannot_be_compared(folder):
    convert(folder / "run", folder / "x.onebit")
    before = (folder / "x.onebit").read_bytes()
    with pytest.raises(ValueError, match="choose another name"):
        convert(folder / "x.onebit", folder / "x.onebit", "r64", verify=True)
    assert (folder / "x.onebit").read_bytes() == before


@pytest.mark.parametrize("name", ["x.onebit", "x.gguf", "x"])
def test_a_full_disk_is_told_by_the_name_that_was_asked_for(name, tmp_path, monkeypatch):
    formats.run.write(tiny.master(tiny.config(d_model=256, d_head=64, d_ff=512)), tmp_path / "run")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        convert(tmp_path / "run", tmp_path / name, allow_lossy=True)
    assert error.value.filename == str(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_source_that_breaks_half_way_leaves_nothing(folder, monkeypatch):

    def fail(name, *rest):
        if name.startswith("layers.1"):
            raise ValueError("the file ends here")
        return check(name, *rest)

    from onebit.formats import native

    check = native.check_tensor
    monkeypatch.setattr(native, "check_tensor", fail)
    with pytest.raises(ValueError, match="ends here"):
        convert(folder / "run", folder / "x.onebit")
    assert sorted(path.name for path in folder.iterdir()) == ["run"]
