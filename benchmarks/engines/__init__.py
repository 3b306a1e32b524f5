"""Engines that only `make bench` measures: the parts of onebit, and the limits of the machine. Others: onebit.bench."""
