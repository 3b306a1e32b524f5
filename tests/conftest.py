"""What every test runs under: no settings of the caller's shell, and the same examples on every run."""

import os

from hypothesis import settings

for _name in ("ONEBIT_ISA", "ONEBIT_THREADS"):
    os.environ.pop(_name, None)

# Tiny models gain nothing from torch's thread pool, whose spinning stalls on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"

# Shared machines stall, so no deadline; derandomised, so that a failure is the same failure for everyone.
settings.register_profile("onebit", deadline=None, derandomize=True, print_blob=False)
settings.load_profile("onebit")
