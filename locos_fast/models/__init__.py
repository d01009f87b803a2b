"""One Hugging Face model: where it keeps things, its attention calls, its residual stream, loading, memory."""

from locos_fast.models.tested_release import warn_if_untested

warn_if_untested()  # once in a process, whatever is used of this room
