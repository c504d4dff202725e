"""GPT models as Equinox PyTrees: train, load, sample and inspect them."""

from eqx_gpt import inspect as inspect
from eqx_gpt.cache import KVCache as KVCache
from eqx_gpt.config import AttentionConfig as AttentionConfig
from eqx_gpt.config import GPTConfig as GPTConfig
from eqx_gpt.config import LayerConfig as LayerConfig
from eqx_gpt.config import LinearScaling as LinearScaling
from eqx_gpt.config import Llama3Scaling as Llama3Scaling
from eqx_gpt.config import LoRAConfig as LoRAConfig
from eqx_gpt.config import MLPConfig as MLPConfig
from eqx_gpt.config import NormConfig as NormConfig
from eqx_gpt.config import PositionConfig as PositionConfig
from eqx_gpt.config import YarnScaling as YarnScaling
from eqx_gpt.generate import Generated as Generated
from eqx_gpt.generate import generate as generate
from eqx_gpt.generate import generate_with_logprobs as generate_with_logprobs
from eqx_gpt.generate import pad_prompts as pad_prompts
from eqx_gpt.generate import stream as stream
from eqx_gpt.gpt import GPT as GPT
from eqx_gpt.inference import for_inference as for_inference
from eqx_gpt.speculative import Draft as Draft
from eqx_gpt.text import complete as complete
from eqx_gpt.text import stream_text as stream_text
from eqx_gpt.tree import cast as cast
from eqx_gpt.tree import count_params as count_params
from eqx_gpt.zoo import get_config as get_config
from eqx_gpt.zoo import list_models as list_models

__version__ = "0.1.0"
