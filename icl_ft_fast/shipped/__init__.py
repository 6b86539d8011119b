"""The shipped model: its recipe, its tokenizer and, in model/, the weights."""
