"""Engines that can be measured, one file each; `onebit.bench.worker` holds one in a process of its own.

Each is a class with the methods of `onebit.bench.measures.Texts`, made of a path and a number of threads.
"""
