"""These tests run kernels in Triton's interpreter, which is chosen when Triton is imported: `make test` gives them a
process of their own, and any other run leaves them out."""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*"]
