"""What is wrong with a machine, a model, or what was measured of it, and what helps."""
