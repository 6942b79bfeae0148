"""The scoring service: an HTTP front over Ray workers that hold the scorer language model and the NLI model.

From the top, as a start of ``python -m verl.utils.siop.scoring_server`` passes through it: :mod:`settings` reads the
command line, :mod:`app` holds the endpoints, whose bodies and answers are in :mod:`wire`, :mod:`guard` stands before
them, :mod:`metrics` counts, :mod:`serve` serves until a signal. Below, :mod:`pool` spreads requests over the Ray actors
of :mod:`workers`, in a private Ray whose directory is :mod:`ray_dir`'s, and :mod:`engines` compute the scores.
"""
