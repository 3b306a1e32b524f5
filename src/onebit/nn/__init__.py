"""The model as differentiable mathematics (torch); the engine's oracle."""
