"""What is timed, how, and the recorded results; `python -m benchmarks --help`. NOTES.md says what to expect and why."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # read when torch is imported: its profiler announces itself otherwise
