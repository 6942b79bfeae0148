"""Games whose every turn an oracle can check. Pure Python: nothing here knows of verl, models or tokens.

Each game is one file of rules and one for its oracle; the rules never ask the oracle. ``docs/games.md`` shows how to
add another game.
"""
