"""What clients talk to: one port, two lanes, one relay."""
