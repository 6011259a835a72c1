"""Encoder-decoders of the literature on the fast modules; same names as in fastseq.reference."""
