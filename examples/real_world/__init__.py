"""Two-hop questions in plain English over countries, cities and currencies, for a real language model on a CPU."""
