"""Training the attention encoder-decoder on parallel text: what ``fastseq train`` runs."""
