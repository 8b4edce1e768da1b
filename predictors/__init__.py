"""Methods that decide which weights a token does not need; one folder each."""
