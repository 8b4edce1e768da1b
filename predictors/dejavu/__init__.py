"""Deja Vu: small networks predict, before a layer begins, which neurons and heads it needs."""
