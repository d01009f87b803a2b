"""One Hugging Face model: where it keeps things, its attention calls, its residual stream, loading, memory."""
