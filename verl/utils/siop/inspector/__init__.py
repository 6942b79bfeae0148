"""A page over dumped rollouts that shows which turns were paid, and why.

:mod:`schema` says what a dump holds; the trainer writes it, and the page reads nothing else. :mod:`dump` finds the
files of a run, :mod:`index` makes them searchable, :mod:`views` makes of them what the page shows, :mod:`recompute` the
credit under other keys, :mod:`app` serves it and :mod:`export` puts it into one file.
"""
