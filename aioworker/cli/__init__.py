"""Options to commands, values to words: alone prints and exits."""
