"""A pass replayed on tensors that have a size and nothing else: the modules of `transformers`, operator by operator.

What lives depends on what each operator saves for its backward pass and on how long the program refers to a tensor, so the functions
here read like the modules: a tensor lives as long as a variable or a saved reference holds it (CPython's reference counts, on which
PyTorch relies too), and backward runs over the recorded operators in reverse.

tape: storages and recorded operators; kernels: each operator's closed form; layout: which parts read what; habits: what a class does
that its parts do not say; blocks: attention, MLP, experts, recurrence; model: streams of blocks, heads and losses.

Shape legend: B batch_size, Q query positions, K key positions, H attention heads, G key/value heads, D head_dim, V vocabulary,
I in_features, O out_features, S experts' rows, N state size.
"""
