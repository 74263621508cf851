"""The public operations, each with its ``torch.library`` op beside it."""

from safealloc.ops import acquire as acquire  # registers torch.ops.safealloc.acquire
