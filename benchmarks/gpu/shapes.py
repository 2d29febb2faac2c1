"""Shapes of the Llamas, and how long a sequence and a chunk of the loss are: constants, nothing imported."""

from typing import Final

SEQUENCE: Final = 4096
LOSS_CHUNK: Final = 4096

SHAPES: Final[dict[str, dict[str, int]]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    "3b": {"hidden_size": 3200, "intermediate_size": 8640, "num_hidden_layers": 26, "num_attention_heads": 32},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
VOCABULARY: Final = {"tiny": 512}
DEFAULT_VOCABULARY: Final = 32_000
