"""How fast, and with how much memory: `python -m benchmarks` asks every question in `benchmarks/questions`."""
