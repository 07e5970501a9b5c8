"""Prompts in, text out: the tokenizer, the loop over tokens, and what of an answer is certain while it is written."""
