"""llama.cpp built, tested, installed and kept current on this machine.

`maker` makes one build from start to end, for `llamesh build` (the same as `scripts/build_llama`) and for
a running node alike; `manager` says when a node makes one; `rollout` moves its instances over.
"""
