"""What the program knows of itself: counters, learned values, logs."""
