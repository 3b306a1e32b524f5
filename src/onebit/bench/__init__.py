"""How fast a model is, measured beside the machine and other engines, in turn and in a process each."""
