"""What we measure, each figure beside what it is compared with. `python -m benchmarks --list` names them."""
