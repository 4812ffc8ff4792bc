"""From a prompt to token ids, from logits to the next token, and from tokens to text."""
