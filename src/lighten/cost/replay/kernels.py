"""Each operator's closed form: what it makes, what it saves, what its backward pass makes and needs beside that."""

from __future__ import annotations

from collections.abc import Sequence

from lighten.cost.operators import Forward, rows_of
from lighten.cost.replay.habits import Habits
from lighten.cost.replay.tape import Tape, Tensor
from lighten.cost.workload import Workload
from lighten.model.spec import Attention, Conv, Elementwise, Embedding, Linear, ModelSpec, Norm

FLOAT32 = 4
INT64 = 8


class Kernels(Tape):
    """Operators on the positions of one stream.

    Attributes:
        batch, queries, keys: lengths of the stream that runs now.
        habits: of the stream that runs now.
    """

    def __init__(self, spec: ModelSpec, workload: Workload, forward: Forward) -> None:
        super().__init__(workload.dtype, training=workload.phase == "train")
        self.spec, self.workload, self.forward = spec, workload, forward
        self.batch, self.queries, self.keys = forward.batch_size, forward.query_len, forward.key_len
        self.habits = Habits()

    def linear(self, part: Linear, x: Tensor) -> Tensor:
        """rows · O; saves x for the weight's gradient."""
        return self.record(rows_of(part, self.forward) * part.out_features, [x], [x], part=part)

    def embedding(self, part: Embedding, indices: Sequence[Tensor]) -> Tensor:
        """rows · dim; backward makes a whole table, and first sums what positions share over the batch."""
        shared = part.rows == "position" or isinstance(part.rows, int)
        rows = part.rows if isinstance(part.rows, int) else rows_of(part, self.forward)
        out = self.tensor(rows * part.embedding_dim)
        return self.record(out, saved=indices, part=part, scratch=out.bytes if shared else 0)

    def conv(self, part: Conv, x: Tensor) -> Tensor:
        """rows · O; saves its input."""
        return self.record(rows_of(part, self.forward) * part.out_channels, [x], [x], part=part)

    def norm(self, part: Norm, x: Tensor) -> Tensor:
        return self.rmsnorm(part, x) if part.kind == "rmsnorm" else self.layernorm(part, x)

    def layernorm(self, part: Norm, x: Tensor) -> Tensor:
        """One kernel: saves its input, and mean and deviation of each row."""
        out, statistics = self.tensor(x.elements), self.tensor(2 * x.elements // part.size)
        return self.record(out, [x], [x, statistics], part=part)

    def rmsnorm(self, part: Norm, x: Tensor) -> Tensor:
        """Written out in float32, so autograd saves the input (twice the size of a bfloat16 one), the root and the normed value."""
        wide = self.cast(x, FLOAT32)
        square = self.hold(wide.bytes)
        root = self.record(wide.elements // part.size, [wide], [wide], scratch=3 * wide.bytes)  # expanded gradient, power, their product
        del square
        normed = self.record(wide.elements, [wide, root], [wide, root], scratch=wide.bytes)  # the root's gradient before it is summed
        normed = self.cast(normed, self.element)
        return self.record(x.elements, [normed], [normed], part=part, scratch=x.bytes)  # so the weight's

    def cast(self, x: Tensor, element: float) -> Tensor:
        return x if x.element == element else self.record(self.tensor(x.elements, element), [x])

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """Saves nothing; both get the same gradient."""
        return self.record(max(x.elements, y.elements), [x, y], passes=True)

    def spread(self, x: Tensor) -> Tensor:
        """Seen as larger: its gradient is a sum, of its own size."""
        return self.record(x.view(), [x])

    def multiply(self, x: Tensor, y: Tensor) -> Tensor:
        return self.record(x.elements, [x, y], [x, y])

    def activate(self, part: Elementwise, x: Tensor) -> Tensor:
        """GELU and SiLU save their input, ReLU, tanh and sigmoid their output; variants that are written out save more."""
        if part.component != "pooler" and self.habits.activation in ("gelu_new", "gelu_fast", "gelu_python", "quick_gelu") and part.kind == "gelu":
            return self.quick_gelu(x) if self.habits.activation == "quick_gelu" else self.gelu_new(x)
        if part.kind == "silu" and self.habits.activation == "quick_gelu":
            return self.quick_gelu(x)
        if part.kind == "relu2":
            relu = self.kept_output(x)
            return self.record(relu.elements, [relu], [relu])
        return self.kept_output(x) if part.kind in ("relu", "tanh", "sigmoid") else self.kept_input(x)

    def kept_input(self, x: Tensor) -> Tensor:
        out = self.tensor(x.elements, x.element)
        return self.record(out, [x], [x])

    def kept_output(self, x: Tensor) -> Tensor:
        out = self.tensor(x.elements, x.element)
        return self.record(out, [x], [out])

    def quick_gelu(self, x: Tensor) -> Tensor:
        """x · sigmoid(1.702 x), written out."""
        return self.multiply(x, self.kept_output(self.scale(x)))

    def gelu_new(self, x: Tensor) -> Tensor:
        """½x · (1 + tanh(c · (x + a·x³))), written out."""
        half = self.scale(x)
        inner = self.scale(self.add(x, self.scale(self.record(x.elements, [x], [x], scratch=2 * x.bytes))))
        tanh = self.tensor(x.elements)
        self.record(tanh, [inner], [tanh])
        del inner
        shifted = self.record(x.elements, [tanh], passes=True)
        del tanh
        return self.multiply(half, shifted)

    def dropout(self, x: Tensor, probability: float) -> Tensor:
        """Saves the noise that it multiplied with."""
        if not (self.training and probability):
            return x
        noise = self.tensor(x.elements, x.element)
        return self.record(x.elements, [x], [noise])

    def scale(self, x: Tensor) -> Tensor:
        """A product with a number saves nothing, but its gradient is a new tensor."""
        return self.record(x.elements, [x])

    def softmax(self, x: Tensor) -> Tensor:
        return self.kept_output(x)

    def product(self, x: Tensor, y: Tensor, elements: int) -> Tensor:
        """Of batches of matrices: saves both."""
        return self.record(elements, [x, y], [x, y])

    def rotate(self, x: Tensor) -> Tensor:
        """x·cos + rotate_half(x)·sin, where sine and cosine need no gradient: saves them alone."""
        cosine_part, halves = self.hold(x.bytes), self.hold(x.bytes)
        sine_part = self.hold(x.bytes)
        del halves
        out = self.record(x.elements, [x], self.shared[:1], scratch=2 * x.bytes)
        del cosine_part, sine_part
        return out

    def split_heads(self, x: Tensor, heads: int, *, strided: bool) -> Tensor:
        """[B, Q, H·D] seen as [B, H, Q, D]. Backward lays a strided gradient out anew for the linear before."""
        return self.record(x.view(), [x], passes=not (strided and self.queries > 1 and heads > 1))

    def join_heads(self, x: Tensor, heads: int) -> Tensor:
        """[B, H, Q, D] laid out as [B, Q, H·D]."""
        if self.queries == 1 or heads == 1:
            return x
        return self.record(x.elements, [x], passes=self.batch == 1)

    def lay_out(self, x: Tensor) -> Tensor:
        """A copy in another order."""
        return self.record(x.elements, [x], passes=True)

    def as_matrices(self, x: Tensor, heads: int, *, head_major: bool = False) -> Tensor:
        """[B, H, Q, D] as B·H matrices: a copy where the positions lie between batch and heads."""
        if head_major or self.batch == 1 or self.queries == 1 or heads == 1:
            return x
        return self.record(x.elements, [x], passes=True)

    def repeat_heads(self, part: Attention, x: Tensor) -> Tensor:
        """Each key/value head once for each of its query heads: a copy, unless there is but one head to see again."""
        times = part.num_attention_heads // part.num_key_value_heads
        if times == 1:
            return x
        return self.record(x.view(x.elements * times) if part.num_key_value_heads == 1 else x.elements * times, [x])

    def repeated_matrices(self, part: Attention, x: Tensor, *, head_major: bool) -> Tensor:
        """Keys or values as B·H matrices; one head that is seen again has to be copied for several sequences."""
        if part.num_key_value_heads == 1 < part.num_attention_heads and self.batch > 1:
            return self.lay_out(x)
        return self.as_matrices(x, part.num_attention_heads, head_major=head_major)

    def mean(self, x: Tensor) -> Tensor:
        return self.record(1, [x])
