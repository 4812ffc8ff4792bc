"""What `npvlm doctor` looks at, one file for each kind of check."""
