"""Models in and out: the Hugging Face layout, the hub, GGUF files, run directories."""

from weights.adapters import load_adapter as load_adapter
from weights.adapters import save_adapter as save_adapter
from weights.errors import WeightsError as WeightsError
from weights.gguf import save_gguf as save_gguf
from weights.load import from_pretrained as from_pretrained
from weights.save import save_pretrained as save_pretrained
from weights.tokenizer import load_tokenizer as load_tokenizer
