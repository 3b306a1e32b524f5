"""Exact: what `onebit info` and `onebit convert` report, and what convert writes."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

import tiny
from onebit import formats
from onebit.checkpoint import quantize
from onebit.cli import main
from onebit.engine.model import available_isas
from onebit.parts import parts, token_bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    formats.run.write(tiny.master(), folder / "run")
    formats.run.write(tiny.master(tiny.config(weights="dense", activations="none")), folder / "dense")
    formats.write(quantize(tiny.master()), folder / "tiny.onebit")
    return folder


def cli(folder, *args, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "onebit", *args],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"COLUMNS": "120"} | environment,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


def rows(text):
    """Tables as {first cell: the others}."""
    cells = [[cell for cell in line.strip().split("  ") if cell] for line in text.splitlines()]
    return {row[0]: [cell.strip() for cell in row[1:]] for row in cells if row}


def test_info_shows_machine_and_model(folder):
    code, out, err = cli(folder, "info", "tiny.onebit", ONEBIT_ISA="scalar", ONEBIT_THREADS="2")
    assert (code, err) == (0, "")
    shown = rows(out)
    assert shown["kernels present"] == [", ".join(available_isas())]
    assert shown["self-test"] == ["passed by all"]
    assert shown["kernels chosen"] == ["scalar"]
    assert shown["threads"] == ["2"]
    assert shown["label"] == ["W1.58A8KV16"]
    assert shown["context"] == ["192 tokens"]
    assert shown["encoding"] == ["t80"]
    for part in parts(quantize(tiny.master())):
        assert shown[part.name][-1] == f"{part.n_bytes:,}"
        assert not part.n_weights or shown[part.name][1] == f"{part.bits_per_weight:.2f}"
    size = (folder / "tiny.onebit").stat().st_size
    assert shown["file"][0].startswith(f"{size:,} bytes")
    assert shown["read by each token"] == [f"{token_bytes(quantize(tiny.master())):,} bytes of weights"]
    assert shown["keys, values as bf16"] == ["256,000 bytes for 1,000 tokens"]
    assert shown["outlook"] == ["fits into memory with its whole context"]
    shares = [float(share.split(": ")[1].rstrip("%")) for share in shown["codes"][0].split(", ")]
    assert len(shares) == 3 and abs(sum(shares) - 100) < 0.2


def test_info_names_kernels_that_failed_their_self_test(monkeypatch, capsys):
    monkeypatch.setattr("onebit.engine.model.broken_isas", lambda: ["amx", "avx2"])
    monkeypatch.setattr("sys.argv", ["onebit", "info"])
    with pytest.raises(SystemExit):
        main()
    assert rows(capsys.readouterr().out)["self-test"] == ["failed, and not used: amx, avx2"]


def test_info_sums_up_the_provenance(tmp_path):
    recipe = {"name": "tiny", "optim": {"lr": 0.003}}
    provenance = {
        "corpus_sha256": "0123456789abcdef" * 4,
        "by": "[me]",
        "recipe": recipe,
        "steps": 9,
        "files": [],
    }
    packed = replace(quantize(tiny.master()), provenance=provenance)
    formats.write(packed, tmp_path / "tiny.onebit")
    code, out, _ = cli(tmp_path, "info", "tiny.onebit")
    assert code == 0
    shown = list(rows(out[out.index("provenance") : out.index("can become")]).items())
    expected = {"recipe": "tiny", "steps": "9", "corpus_sha256": "0123456789abcdef", "by": "[me]"}
    assert shown[2:] == [(name, [value]) for name, value in expected.items()]


def test_info_shows_a_run_folder_as_it_is_packed(folder):
    packed, run = (rows(cli(folder, "info", name)[1]) for name in ("tiny.onebit", "run"))
    assert packed["linear"] == run["linear"]
    assert packed["codes"] == run["codes"]


def test_info_shows_a_full_precision_twin(folder):
    code, out, _ = cli(folder, "info", "dense")
    assert code == 0
    assert rows(out)["label"] == ["W16A16KV16"]
    assert rows(out)["encoding"] == ["bf16"] and "codes" not in rows(out)


def test_info_shows_the_scheme_of_each_layer(tmp_path):
    table = ("b1.58", "b1", "b1", "b1.58")
    formats.write(tiny.master(tiny.config(n_layers=4, layer_weights=table)), tmp_path / "x.onebit")
    code, out, _ = cli(tmp_path, "info", "x.onebit", "--verify")
    assert code == 0 and rows(out)["weights of layers"] == ["b1.58, 2 x b1, b1.58"]
    assert rows(out)["label"] == ["W1.29A8KV16"] and rows(out)["encoding"] == ["b128, t80"]
    assert "no: layers with b1.58 and with b1 weights" in " ".join(out.split())


def test_info_shows_a_model_of_no_family(tmp_path, monkeypatch, capsys):
    master = tiny.master(tiny.config(qk_norm=True))
    formats.write(quantize(master), tmp_path / "x.onebit")
    # As a reader of another format gives it.
    monkeypatch.setattr(formats, "read", lambda path: master)
    monkeypatch.setattr(formats, "is_native", lambda path: False)
    monkeypatch.setattr("sys.argv", ["onebit", "info", str(tmp_path / "x.onebit")])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and "no other program has" in " ".join(shown.split())


def test_info_shows_coded_rows(tmp_path):
    formats.write(tiny.coded(tiny.master(tiny.config(weights="b1", scale=16))), tmp_path / "x.onebit")
    code, out, _ = cli(tmp_path, "info", "x.onebit", "--verify")
    assert code == 0 and rows(out)["label"] == ["W1A8KV16H1"]
    assert rows(out)["head"] == ["b128 codes, 15-bit activations"]
    code, _, err = cli(tmp_path, "run", "Once", "-m", "x.onebit", "--shortlist", "int4")
    assert code == 2 and "shortlist int4: the head is b128 codes" in err and err.count("\n") == 1


def test_info_verify_finds_a_flipped_bit(folder, tmp_path):
    assert "verified" in cli(folder, "info", "tiny.onebit", "--verify")[1]
    data = bytearray((folder / "tiny.onebit").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "flipped.onebit").write_bytes(data)
    code, _, err = cli(tmp_path, "info", "flipped.onebit", "--verify")
    assert code == 2
    assert err.startswith("onebit: error: ") and err.count("\n") == 1


def test_convert_writes_the_file_and_reports_on_stderr(folder, tmp_path):
    code, out, err = cli(folder, "convert", "run", str(tmp_path / "out.onebit"))
    assert (code, out) == (0, "")
    assert (tmp_path / "out.onebit").read_bytes() == (folder / "tiny.onebit").read_bytes()
    _, bits, _ = rows(cli(folder, "info", "tiny.onebit")[1])["linear"]
    assert rows(err)["linear"][1:5] == ["F32", "t80", bits, "as trained"]


def test_convert_changes_the_layout_and_back(folder, tmp_path):
    wide, back = str(tmp_path / "wide.onebit"), tmp_path / "back.onebit"
    assert cli(folder, "convert", "tiny.onebit", wide, "--encoding", "r64")[0] == 0
    assert formats.read(wide).tensors["layers.0.q.weight"].encoding == "r64"
    assert cli(folder, "convert", wide, str(back), "--encoding", "t80")[0] == 0
    assert back.read_bytes() == (folder / "tiny.onebit").read_bytes()


def test_convert_keeps_the_head_in_bf16(folder, tmp_path):
    code, _, err = cli(folder, "convert", "run", str(tmp_path / "x.onebit"), "--head", "bf16")
    assert code == 0 and "W1.58A8KV16H16" in err
    shown = rows(cli(folder, "info", str(tmp_path / "x.onebit"), "--verify")[1])
    assert shown["label"] == ["W1.58A8KV16H16"] and shown["head"][0].startswith("bfloat16")
    code, _, err = cli(folder, "convert", "tiny.onebit", str(tmp_path / "y.onebit"), "--head", "bf16")
    assert code == 2 and "convert the run folder with head bf16" in err
    code, _, err = cli(folder, "run", "Once", "-m", str(tmp_path / "x.onebit"), "--shortlist", "int4")
    assert code == 0 and "W1.58A8KV16H16 + int4 shortlist" in err
