"""Tokenizers of the text encoders and the language models: text to ids and back."""

from reaf_hsenet.tokenizer.loading import load_tokenizer, load_wordpiece
from reaf_hsenet.tokenizer.tokenizer import Tokenizer, WordPiece

__all__ = ["Tokenizer", "WordPiece", "load_tokenizer", "load_wordpiece"]
