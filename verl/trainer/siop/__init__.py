"""SIOP inside verl's PPO trainer: estimator (`advantage`), trainer, checks before the start, entry point (`main`)."""
