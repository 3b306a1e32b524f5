"""Engines that can be measured, each in a process of its own: worker.py runs one, and asks it on demand."""
