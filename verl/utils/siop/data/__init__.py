"""Question sets as data for training and evaluation: from where they are published to verl's parquet.

``python -m verl.utils.siop.data --help``; docs/data.md tells what every column means and what is wrong with the labels.
"""
