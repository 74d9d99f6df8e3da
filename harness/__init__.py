"""What tests and benchmarks both stand on: ranks of a moment, and stores of random groups."""
