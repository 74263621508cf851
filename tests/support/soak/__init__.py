"""A random walk over everything that a pool promises, and an oracle that checks each step.

- ``work``: what is quantized and multiplied, and what the plain-torch reference says of it.
- ``oracle``: where padding is, by formulas of its own.
- ``walk``: the pools and graphs that the walk changes, one step, and what is checked after each.
- ``registry``: actions by name; ``calls``, ``refusals``, ``corruption``, ``lifetimes`` and ``graphs`` hold them.
- ``__main__``: the command.
"""
