"""CATS and CHESS: neurons whose act(gate) is small are skipped in up and down."""
