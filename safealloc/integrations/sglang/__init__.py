"""The pool as the memory of SGLang's block scales.

Installed beside SGLang it registers itself, through the entry point group ``sglang.srt.plugins``; :func:`register` and
:func:`unregister` do the same by hand. Nothing here imports SGLang before it is needed.
"""

from safealloc.integrations.sglang.plugin import register, unregister

__all__ = ["register", "unregister"]
