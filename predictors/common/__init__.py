"""What several methods share offline: corpora, activations of single layers, allocation of levels."""
