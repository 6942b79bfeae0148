"""What an evaluation leaves and what is made of it: questions, manifest, summaries with intervals, comparison, tables.

The evaluated questions are in ``questions.jsonl``, everything that the numbers depend on in ``manifest.json``, which is
written last: a folder without it holds no finished evaluation.
"""
