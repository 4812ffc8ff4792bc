"""What comes from disk: weights, tokenizer, pictures. Each file is checked before it is used."""
