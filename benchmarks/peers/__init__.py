"""Training steps and roundings of other tools, each in a process of its own that has the tool."""
