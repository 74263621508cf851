"""The pool as vLLM's NVFP4 scale allocator.

Installed beside vLLM it registers itself, through the entry point group ``vllm.general_plugins``; :func:`register` and
:func:`unregister` do the same by hand. Nothing here imports vLLM before it is needed.
"""

from safealloc.integrations.vllm.plugin import register, unregister

__all__ = ["register", "unregister"]
