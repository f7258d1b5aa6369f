"""Commands besides training: each module is one of them."""
