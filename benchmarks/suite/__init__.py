"""The microbenchmark suite: jobs, what implements them, a clock that takes turns, and results that can be compared."""
