"""The retrieval service: searches over a corpus, in Search-R1's wire format.

:mod:`corpus` reads passages from a file, :mod:`bm25` and :mod:`dense` rank them, :mod:`build` makes their indexes and
:mod:`server` answers over HTTP: the two entry points.
"""
