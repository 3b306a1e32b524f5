"""Numbers of other formats. Kinds: exact (bits), oracle (torch), invariant (rows of a file)."""

import numpy as np
import pytest

from onebit.formats import floats

VALUES = np.array([0.0, -0.0, 1.0, -2.5, 3.14159, 65504.0, 1e-7, 1e-40, 3e38, -1e5], np.float32)


@pytest.mark.parametrize("dtype", floats.FLOATS)
def test_rounding_is_that_of_torch(dtype):
    import torch

    kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    expected = torch.tensor(VALUES).to(kind)
    encoded = floats.encode(VALUES, dtype)
    assert encoded.tobytes() == expected.view(torch.uint8).numpy().tobytes()
    decoded = floats.decode(np.frombuffer(encoded.tobytes(), np.uint8), dtype)
    assert np.array_equal(decoded, expected.float().numpy())


@pytest.mark.parametrize("dtype", floats.FLOATS)
def test_rows_of_a_file_are_its_values(dtype, tmp_path):
    rng = np.random.default_rng(0)
    w = floats.encode(rng.standard_normal((7, 5)).astype(np.float32), dtype)
    path = tmp_path / "x"
    path.write_bytes(b"abc" + w.tobytes())
    stored = floats.in_file(path, 3, dtype, (7, 5))
    assert (stored.kind, stored.n_bytes, stored.codes) == (dtype, w.nbytes, None)
    assert np.array_equal(
        stored.rows(2, 6), floats.decode(w[2:6].copy().view(np.uint8).reshape(-1), dtype).reshape(4, 5)
    )
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="the file ends at byte"):
        stored.rows(6, 7)
