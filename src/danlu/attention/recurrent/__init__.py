"""Recurrent mixers: linear recurrent units, their block and cache, and RWKV-4's average."""
