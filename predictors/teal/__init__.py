"""TEAL: inputs of small magnitude are skipped at all matrices of a block."""
