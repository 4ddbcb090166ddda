"""Training steps of other tools, each in a process of its own that has torch and the tool, and not jax."""
