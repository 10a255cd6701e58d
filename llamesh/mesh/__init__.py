"""Other machines: who they are, how to reach them, what they said, and the streams to them."""
