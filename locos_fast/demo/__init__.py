"""The demonstration behind `locos-fast demo`: a model whose heads are known, then a real one."""
