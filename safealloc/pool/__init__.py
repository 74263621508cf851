"""Zero-padded scale buffers: who gets which, how long they live, and who watches them."""
