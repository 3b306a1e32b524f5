"""Exact and invariant: documents of every container, shards, token bytes, and batches as pure functions."""

import bz2
import gzip
import io
import json
import lzma
import tarfile

import numpy as np
import pytest
from tokenizers import Tokenizer

import tiny
from onebit.formats import vocabulary
from onebit.train import data


def test_documents_of_every_container_in_path_order(tmp_path):
    (tmp_path / "a.txt").write_text("one<|endoftext|> two \n<|endoftext|>\n")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n\n{"text": "four", "source": "x"}\n')
    (tmp_path / "c.md.gz").write_bytes(gzip.compress(b"five"))
    (tmp_path / "d.txt.xz").write_bytes(lzma.compress(b"six"))
    (tmp_path / "e.jsonl.bz2").write_bytes(bz2.compress(b'{"text": "seven"}'))
    with tarfile.open(tmp_path / "f.tar.xz", "w:xz") as archive:
        for name, content in (("x/2.txt", b"nine"), ("x/1.md", b"eight"), ("x/3.bin", b"\xff\xfe")):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    assert (
        list(data.read_documents(tmp_path, ("*",))) == "one two three four five six seven eight nine".split()
    )
    assert list(data.read_documents(tmp_path, ("*.jsonl", "*/x/2.txt"))) == ["three", "four", "seven", "nine"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", "a.txt: not UTF-8 text"),
        ("a.txt", "Once upon a time".encode("utf-16-le"), "a.txt: holds zero bytes"),
        ("a.md", bytes(range(32)) * 9, "a.md: holds zero bytes"),
        ("a.jsonl", b'{"text": 1}', "a.jsonl, line 1: expected"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}', "a.jsonl, line 2: expected"),
        ("a.jsonl", b"[]", "a.jsonl, line 1: expected"),
        ("a.jsonl", b"{", "a.jsonl, line 1: expected"),
        ("a.txt.xz", b"not xz", "a.txt.xz"),
        ("a.tar.gz", b"not tar", "a.tar.gz"),
        ("a.tar", b"not tar", "a.tar: cannot be unpacked"),
        ("a.txt.bz2", b"BZh9 not bz2", "a.txt.bz2: cannot be unpacked"),
        ("a.tar.bz2", b"BZh9 not bz2", "a.tar.bz2: cannot be unpacked"),
        ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl, line 1: .* valid Unicode"),
        ("a.jsonl", b"[" * 100000, "a.jsonl, line 1: expected"),
        ("a.jsonl", b"1" * 10000, "a.jsonl, line 1: expected"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(data.read_documents(tmp_path, ("*",)))


def test_line_ends_inside_strings_and_byte_order_marks(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('\ufeff{"text": "a\u2028b\x85c"}\r\n\r\n{"text": "d"}\r\n'.encode())
    (tmp_path / "b.txt").write_bytes("\ufeffe\r\nf".encode())
    assert list(data.read_documents(tmp_path, ("*",))) == ["a\u2028b\x85c", "d", "e\r\nf"]


def test_an_archive_bomb_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_TEXT_BYTES", 10**6)
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(b"a" * 10**6))
    assert len(next(data.read_documents(tmp_path, ("*",)))) == 10**6
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(b"a" * (10**6 + 1)))
    with pytest.raises(ValueError, match=r"a.txt: holds more than 1000000 bytes; split it or leave it out"):
        list(data.read_documents(tmp_path, ("*",)))


def test_links_and_devices_in_an_archive_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in (("l", tarfile.SYMTYPE), ("h", tarfile.LNKTYPE), ("c", tarfile.CHRTYPE)):
            entry = tarfile.TarInfo(f"{name}.txt")
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
        for name in ("/absolute.txt", "../above.txt"):
            entry = tarfile.TarInfo(name)
            entry.size = len(name)
            archive.addfile(entry, io.BytesIO(name.encode()))
    assert list(data.read_documents(tmp_path, ("*",))) == ["../above.txt", "/absolute.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        list(data.read_documents(tmp_path / "nowhere", ("*",)))
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(NotADirectoryError, match="is a file; --data expects the folder that it lies in"):
        list(data.read_documents(tmp_path / "a.txt", ("*",)))
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match="no text found"):
        data.prepare(tmp_path / "data", tmp_path / "out", ("*",), 300, 0.1, 8)
    assert not (tmp_path / "out").exists()


def stories(folder, n=60):
    folder.mkdir()
    lines = [json.dumps({"text": f"{tiny.TEXT[: 40 + i]} caf\u00e9 {i}"}) for i in range(n)]
    (folder / "stories.jsonl").write_text("\n".join(lines + lines[:5]))
    return folder


def test_shards_hold_each_document_once_and_parts_are_disjoint(tmp_path):
    corpus = data.prepare(stories(tmp_path / "data"), tmp_path / "out", ("*",), 300, 0.3, 16)
    tokenizer = Tokenizer.from_buffer(corpus.tokenizer)
    parts = []
    for tokens in (corpus.train, corpus.held_out):
        assert tokens[-1] == corpus.end_token
        texts = tokenizer.decode(tokens.tolist(), skip_special_tokens=False).split(data.END_OF_TEXT)
        parts.append({text for text in texts if text})
    assert len(parts[0] | parts[1]) == 60 and not parts[0] & parts[1] and len(parts[1]) > 5
    for tokens, texts in zip((corpus.train, corpus.held_out), parts, strict=True):
        assert corpus.token_bytes[tokens].sum() == sum(len(text.encode()) for text in texts)


def test_a_single_book_is_held_out_in_parts(tmp_path):
    (tmp_path / "data").mkdir()
    book = "\n".join(f"Line {i} of the book says {i * i}." for i in range(2000))
    (tmp_path / "data" / "book.txt").write_text(book)
    corpus = data.prepare(tmp_path / "data", tmp_path / "out", ("*",), 300, 0.1, 64)
    tokenizer = Tokenizer.from_buffer(corpus.tokenizer)
    parts = [
        tokenizer.decode(tokens.tolist(), skip_special_tokens=False).split(data.END_OF_TEXT)[:-1]
        for tokens in (corpus.train, corpus.held_out)
    ]
    assert len(corpus.held_out) > 64
    assert "".join(sorted(parts[0] + parts[1], key=book.index)) == book
    assert not set(parts[0]) & set(parts[1])


def test_pieces_end_with_lines_or_words_and_lose_nothing():
    for text in ("a" * 10000, "word " * 3000, ("x" * 99 + "\n") * 100, "short"):
        pieces = data._cut(text)
        assert "".join(pieces) == text and all(0 < len(p) <= data.PIECE_CHARACTERS for p in pieces)
    assert all(piece.endswith(" ") for piece in data._cut("word " * 3000))


def test_finished_shards_are_reused_without_the_text(tmp_path):
    folder = stories(tmp_path / "data")
    first = data.prepare(folder, tmp_path / "out", ("*",), 300, 0.3, 16)
    (folder / "stories.jsonl").unlink()
    again = data.prepare(folder, tmp_path / "out", ("*",), 300, 0.3, 16)
    assert again.sha256 == first.sha256 and np.array_equal(again.train, first.train)


@pytest.mark.parametrize("content", ["", " \n\t \n"])
def test_files_without_text_are_no_text(tmp_path, content):
    for name in ("a.txt", "b.jsonl", "c.md"):
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match="no text found; expected"):
        data.prepare(tmp_path, tmp_path / "out", ("*",), 300, 0.3, 16)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["train.npy", "held_out.npy", "tokenizer.json", "corpus.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\x93NUMPY\x01\x00"])
def test_damaged_shards_are_named(tmp_path, name, content):
    out = tmp_path / "out"
    data.prepare(stories(tmp_path / "data"), out, ("*",), 300, 0.3, 16)
    (out / name).write_bytes(content)
    with pytest.raises(ValueError, match="out: the corpus is damaged"):
        data.prepare(None, out, ("*",), 300, 0.3, 16)


def test_too_little_text_is_refused(tmp_path):
    folder = stories(tmp_path / "data")
    with pytest.raises(ValueError, match="tokens, not 4096"):
        data.prepare(folder, tmp_path / "a", ("*",), 4096, 0.3, 16)
    with pytest.raises(ValueError, match="fewer than one sequence of 100000"):
        data.prepare(folder, tmp_path / "b", ("*",), 300, 0.3, 100000)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_batches_depend_on_seed_and_step_alone_and_cover_an_epoch():
    tokens = np.arange(1003, dtype=np.uint16)
    rows = [row for step in range(10) for row in data.batch(tokens, step, 10, 10, seed=3)]
    starts = sorted(int(row[0]) for row in rows)
    assert len(set(starts)) == 100 and {b - a for a, b in zip(starts, starts[1:], strict=False)} == {10}
    assert all(np.array_equal(row, np.arange(row[0], row[0] + 11)) for row in rows)
    assert np.array_equal(data.batch(tokens, 4, 10, 10, 3), data.batch(tokens, 4, 10, 10, 3))
    assert not np.array_equal(data.batch(tokens, 4, 10, 10, 3), data.batch(tokens, 4, 10, 10, 4))
    assert not np.array_equal(data.batch(tokens, 4, 10, 10, 3), data.batch(tokens, 14, 10, 10, 3))


@pytest.mark.parametrize("prefix", [False, True])
def test_bytes_of_tokens_sum_to_the_text_with_any_tokenizer(prefix):
    pieces = [("\u2581", -1.0, 1), ("a", -2.0, 1), ("\u2581a", -1.5, 1), ("\u00e9", -4.0, 1)]
    model = tiny.sentencepiece_model([*tiny.SENTENCEPIECE_HEAD, *pieces], add_dummy_prefix=prefix)
    for raw, begin, end in ((vocabulary.from_sentencepiece(model), 1, 2), (tiny.tokenizer_json(), 0, 0)):
        tokenizer = Tokenizer.from_buffer(raw)
        n_bytes = data.count_bytes(tokenizer, end)
        for text in ("a a aa", "caf\u00e9 \u2581a", "b\nc", "\U0001f600"):
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            spaces = text.replace("\u2581", " ") if end else text
            assert n_bytes[[*([begin] if begin != end else []), *ids, end]].sum() == len(spaces.encode())
