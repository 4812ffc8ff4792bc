"""The maths of PaliGemma 1 and 2, and nothing else: no files, no tokenizer, no screen."""
