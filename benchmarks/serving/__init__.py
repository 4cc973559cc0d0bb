"""The serving benchmark's parts: the servers, the load generator, what is measured, targets and page. See benchmarks/bench_serve.py."""
