"""Running a packed model: the compiled core, tokenizer, cache blocks, scheduling and sampling."""
