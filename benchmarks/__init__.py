"""Side-by-side measurements of a llamesh node: `python -m benchmarks`. See README.md in this folder."""
