"""Where Triton interprets kernels, two of the interpreter's own mistakes are put right."""

import os


def multiply_bfloat16_values(interpreter):
    """The interpreter keeps bfloat16 as 16-bit integers, and multiplies those; widened to float32 they are exact."""
    import numpy as np
    import triton.language as tl

    original = interpreter.InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        values = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(values, tl.float32)

    def create_dot(self, a, b, *rest):
        return original(self, widened(a), widened(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot


def let_scalars_be_indices(interpreter):
    """Triton 3.6 makes an index of an array of one number by `int`, which NumPy 2.4 refuses; later Tritons do not."""
    original = interpreter._patch_lang_tensor

    def patch(tensor, *scope):
        original(tensor, *scope)
        scope[0].set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    multiply_bfloat16_values(interpreter)
    let_scalars_be_indices(interpreter)
