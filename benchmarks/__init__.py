"""What is timed, how, and the recorded results; `python -m benchmarks --help`. NOTES.md says what to expect and why."""
