"""bitsandbytes' 4-bit storage: the weight, the constants, the codec, the keys of a state dict."""
