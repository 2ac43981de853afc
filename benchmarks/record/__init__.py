"""The parts of `python -m benchmarks.gpu_record`, a module each; what is timed, and why: benchmarks/cases.py."""
