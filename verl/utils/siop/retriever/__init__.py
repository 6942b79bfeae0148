"""The retrieval service: searches over a corpus, in Search-R1's wire format.

:mod:`corpus` reads passages from a file, :mod:`bm25` ranks them, :mod:`server` answers over HTTP: the entry point.
"""
