"""A run as people see and stop it: lines on the terminal, progress, signals, the lock of the output folder."""
