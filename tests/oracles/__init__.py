"""What tests and benchmarks share: tiny models, attention problems, and the bound that every backend's error keeps."""
